#![no_main]

quant_fuzz::target!("tokenizer");
