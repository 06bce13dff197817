"""Steering vectors of other tools: converted to and from packs, never unpickled."""
