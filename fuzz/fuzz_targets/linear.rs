//! Any valid linear layer, on every instruction set, against the oracle.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: xent_fuzz::linear::Input| input.check());
