//! Tests against reference files and hostile ones.

mod arch;
mod fast;
mod generate;
mod golden;
mod malformed;
mod rope;
mod stages;
mod support;
mod tokenizer;
