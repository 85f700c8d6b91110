"""The command line: `ray-detox COMMAND`."""
