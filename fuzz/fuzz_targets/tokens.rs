//! The tokens file: no text ends the node, and no entry lets somebody in who was not meant.

#![no_main]

use im_presence::security::tokens::Tokens;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(tokens) = Tokens::parse(data) {
        assert!(tokens.find(b"").is_none(), "the empty token is nobody's, unless somebody found what SHA-256 hides");
    }
});
