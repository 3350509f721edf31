"""Pure functions from changes to rows, and the one transaction that writes them with their watermark."""
