"""Everything that knows bitnet.cpp: finding and building its library, and the child process that drives it."""
