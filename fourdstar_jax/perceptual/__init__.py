"""How alike pictures look: networks that were trained elsewhere and stay frozen."""
