//! The program as its users see it: arguments in, files, text and exit codes out.

mod bad_input;
mod calibration_free;
mod chat;
mod convert;
mod embed;
mod end_to_end;
mod gpt2;
mod malformed;
mod support;
mod transforms;
mod usage;
