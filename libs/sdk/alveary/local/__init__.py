"""`alveary up`: the whole platform on this machine. The only module that may import services."""
