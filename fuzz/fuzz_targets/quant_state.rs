#![no_main]

quant_fuzz::target!("quant_state");
