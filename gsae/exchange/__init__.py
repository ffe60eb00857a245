"""SAEs that come and go: loading them for use, exporting, importing, the hub. Reads runs; no stage needs it."""
