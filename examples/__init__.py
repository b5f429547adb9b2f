"""The evidence behind the guide. A package, so that bench/ finds it before another of this name."""
