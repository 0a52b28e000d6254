"""What the command line has beside the stages; each module is loaded when its command runs."""
