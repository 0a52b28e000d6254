"""The comparison behind the stage ``compare``: what it reads, computes, draws and says."""
