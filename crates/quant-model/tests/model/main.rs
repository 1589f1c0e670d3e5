//! Tests against reference files and hostile ones.

mod golden;
mod malformed;
mod support;
mod tokenizer;
