"""The command line: `ray-detox VERB`."""
