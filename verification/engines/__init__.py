"""The programs that compute: transformers, llama.cpp, its quantiser, upstream's converter."""
