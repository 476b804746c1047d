//! Any valid problem, on every instruction set, against the oracle.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: xent_fuzz::problem::Input| input.check());
