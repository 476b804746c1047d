//! Any split of a vocabulary, on every instruction set, against the oracle on the whole.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: xent_fuzz::shards::Input| input.check());
