"""The HDF5 store: its layout, writing and reading, checks, and views of its rows."""
