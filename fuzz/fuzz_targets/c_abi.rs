//! The C interface with hostile descriptors over guarded memory.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: xent_fuzz::c_abi::Input| input.check());
