"""The percent scripts beside this folder are the notebooks' source; this writes them with outputs."""
