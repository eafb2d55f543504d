"""What the command line measures and shows. It uses the public names of sink_patch alone, as a user's code would."""
