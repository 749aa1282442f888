//! Configuration files of both forms. What is accepted can be shown and read again.

#![no_main]

use im_presence::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (bool, &str)| {
    let (is_ini, text) = data;
    let file = if is_ini { "im.ini" } else { "im.toml" };
    if let Ok(config) = Config::from_text(file, text) {
        let shown = config.to_string();
        // Secrets are shown as ***, which reads as another secret.
        let again = Config::from_text("im.toml", &shown).expect("what is in force can be read");
        assert_eq!(again.to_string(), shown);
    }
});
