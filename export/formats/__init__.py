"""How weights are stored: encoding, decoding and packing."""
