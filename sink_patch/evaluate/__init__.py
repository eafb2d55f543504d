"""What the command line measures and shows, built on the public names of sink_patch as a user's code would be."""
