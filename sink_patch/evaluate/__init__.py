"""What the command line measures and shows. Built on the public names of sink_patch alone, as a user's code would be."""
