"""The programs that compute: transformers, llama.cpp and its quantiser, llama.cpp's converter."""
