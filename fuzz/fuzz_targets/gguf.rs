#![no_main]

quant_fuzz::target!("gguf");
