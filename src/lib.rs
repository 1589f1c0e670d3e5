//! Quantize language and embedding models and run them on a CPU.
