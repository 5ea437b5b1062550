#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| clan_hostile::qmp(data));
