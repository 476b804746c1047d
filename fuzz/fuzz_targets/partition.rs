//! Any split of rows and threads: the same bits.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: xent_fuzz::partition::Input| input.check());
