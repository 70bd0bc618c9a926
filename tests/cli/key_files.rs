//! `coinop keys`: made once, mode 0600, never printed.

use std::os::unix::fs::PermissionsExt;

use nostr_sdk::prelude::{EncryptedSecretKey, KeySecurity, Keys, SecretKey, ToBech32};

use super::{Home, Said};

fn secret_of(home: &Home) -> SecretKey {
    SecretKey::parse(std::fs::read_to_string(home.data_dir().join("key")).unwrap().trim()).unwrap()
}

fn says_nothing_secret(said: &Said, secret: &SecretKey) {
    for text in [&said.data, &said.talk] {
        assert!(!text.contains(&secret.to_secret_hex()) && !text.contains("nsec1"), "{said:?}");
    }
}

fn import(home: &Home, text: &str, args: &[&str]) -> Said {
    let mut command = home.coinop(&[&["keys", "import"], args].concat());
    command.env("COINOP_KEY_PASSWORD", "pass word").write_stdin(text.to_string());
    Said::of(command)
}

#[test]
fn new_makes_a_private_file_prints_the_public_half_and_never_overwrites() {
    let home = Home::new();
    let said = home.run(&["keys", "new"]);
    assert_eq!(said.code, 0, "{said:?}");
    let secret = secret_of(&home);
    let npub = Keys::new(secret.clone()).public_key().to_bech32().unwrap();
    assert!(said.data.contains(&npub));
    says_nothing_secret(&said, &secret);
    let mode = std::fs::metadata(home.data_dir().join("key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let again = home.run(&["keys", "new"]);
    assert_eq!(again.code, 3);
    assert!(again.talk.contains("--replace"), "{again:?}");
    assert_eq!(secret_of(&home).to_secret_hex(), secret.to_secret_hex());

    let shown = home.run(&["keys", "show", "--json"]);
    assert_eq!(shown.json()["npub"], npub.as_str());
    says_nothing_secret(&shown, &secret);

    let replaced = home.run(&["keys", "new", "--replace"]);
    assert_eq!(replaced.code, 0);
    assert!(secret_of(&home).to_secret_hex() != secret.to_secret_hex());
    let names: Vec<_> = std::fs::read_dir(home.data_dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(names.iter().any(|name| name.to_string_lossy().starts_with("key.until-")), "{names:?}");
}

#[test]
fn a_key_file_that_others_can_read_is_refused_with_the_mend() {
    let home = Home::new();
    home.run(&["keys", "new"]);
    let path = home.data_dir().join("key");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    for args in [&["keys", "show"][..], &["connect", "--nip90", "--relay", "ws://127.0.0.1:1"]] {
        let said = home.run(args);
        assert_eq!(said.code, 3, "{args:?}: {said:?}");
        assert!(said.talk.contains(&format!("chmod 600 {}", path.display())), "{said:?}");
    }
}

#[test]
fn import_takes_nsec_and_hex_from_stdin_and_repeats_neither() {
    for form in [|k: &Keys| k.secret_key().to_bech32().unwrap(), |k: &Keys| k.secret_key().to_secret_hex()] {
        let (home, keys) = (Home::new(), Keys::generate());
        let said = import(&home, &form(&keys), &[]);
        assert_eq!(said.code, 0, "{said:?}");
        assert!(said.data.contains(&keys.public_key().to_bech32().unwrap()));
        says_nothing_secret(&said, keys.secret_key());
    }
}

#[test]
fn an_encrypted_key_stays_encrypted_and_opens_with_the_password_of_the_environment() {
    let (home, keys) = (Home::new(), Keys::generate());
    let locked = EncryptedSecretKey::new(keys.secret_key(), "pass word", 4, KeySecurity::Medium).unwrap();
    let locked = locked.to_bech32().unwrap();
    let said = import(&home, &locked, &["--json"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(said.json()["encrypted"], true);
    assert_eq!(std::fs::read_to_string(home.data_dir().join("key")).unwrap().trim(), locked);

    let mut command = home.coinop(&["keys", "show"]);
    command.env("COINOP_KEY_PASSWORD", "wrong");
    let wrong = Said::of(command);
    assert_eq!(wrong.code, 3);
    assert!(wrong.talk.contains("the password does not open the key"), "{wrong:?}");
    assert!(!wrong.talk.contains("wrong"), "passwords are not repeated either");
}

#[test]
fn bad_input_is_refused_unrepeated_and_leaves_the_old_key_in_place() {
    let home = Home::new();
    home.run(&["keys", "new"]);
    let before = secret_of(&home).to_secret_hex();
    let almost = format!("{}f", Keys::generate().secret_key().to_secret_hex());
    let said = import(&home, &almost, &["--replace"]);
    assert_eq!(said.code, 3);
    assert!(said.talk.contains("contains no key") && !said.talk.contains(&almost), "{said:?}");
    assert_eq!(secret_of(&home).to_secret_hex(), before);
}

#[test]
fn no_command_line_flag_takes_a_secret() {
    let home = Home::new();
    let nsec = Keys::generate().secret_key().to_bech32().unwrap();
    assert_eq!(home.run(&["keys", "import", &nsec]).code, 2);
}
