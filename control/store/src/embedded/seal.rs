//! Encryption at rest of chosen objects.
//!
//! AES-256-GCM with a key of its own for each record, derived (HKDF-SHA-256) from the key file and 128 random bits, so
//! that no number of writes wears the key out. Key and revision of the object are authenticated with it: a value cannot
//! be moved to another object.

use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk};
use ring::rand::{SecureRandom as _, SystemRandom};

use crate::hub::in_scope;
use crate::{Entry, OpenError};

/// The random part before a sealed value.
const SALT_BYTES: usize = 16;
/// How much longer a value gets.
pub(super) const SEAL_OVERHEAD_BYTES: usize = SALT_BYTES + 16;
/// Bytes of a key file: 32 of them as they are, or as 64 hexadecimal digits.
const KEY_BYTES: usize = 32;

/// What is encrypted, and how.
#[derive(Debug, Default)]
pub(super) struct Cipher {
    key: Option<Prk>,
    scopes: Vec<String>,
}

struct Aes256;

impl KeyType for Aes256 {
    fn len(&self) -> usize {
        KEY_BYTES
    }
}

impl Cipher {
    /// Encrypts objects in `scopes` with the key in `file`.
    ///
    /// # Errors
    /// When the file cannot be read, may be read by others, or holds no key.
    pub(super) fn load(file: &Path, scopes: &[String]) -> Result<Cipher, OpenError> {
        let problem = |problem: &str| OpenError::Format { path: file.to_owned(), problem: problem.to_owned() };
        let mut handle = std::fs::File::open(file).map_err(OpenError::io("open the key file", file))?;
        let mode = handle.metadata().map_err(OpenError::io("examine the key file", file))?.mode();
        if mode & 0o077 != 0 {
            return Err(problem("a key file must not be open to group or others: chmod 0600 it"));
        }
        let mut text = Vec::new();
        handle
            .by_ref()
            .take(4 * KEY_BYTES as u64)
            .read_to_end(&mut text)
            .map_err(OpenError::io("read the key file", file))?;
        let key = if text.len() == KEY_BYTES { Some(text) } else { unhex(text.trim_ascii()) };
        let key = key.ok_or_else(|| problem("a key file holds 32 random bytes or 64 hexadecimal digits"))?;
        Ok(Cipher { key: Some(Prk::new_less_safe(HKDF_SHA256, &key)), scopes: scopes.to_vec() })
    }

    fn record_key(key: &Prk, salt: &[u8]) -> LessSafeKey {
        let info = [b"coracle store record".as_slice(), salt];
        let derived = key.expand(&info, Aes256).expect("32 bytes are no more than HKDF gives");
        let mut bytes = [0; KEY_BYTES];
        derived.fill(&mut bytes).expect("the buffer has the length asked for");
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &bytes).expect("the key has the right length"))
    }

    /// The value of `entry` encrypted, if it is one to be encrypted.
    pub(super) fn seal(&self, entry: &Entry) -> Option<Vec<u8>> {
        let key = self.key.as_ref()?;
        if !self.scopes.iter().any(|scope| in_scope(scope, &entry.key)) {
            return None;
        }
        let mut salt = [0; SALT_BYTES];
        SystemRandom::new().fill(&mut salt).expect("the kernel gives random bytes");
        let mut sealed = Vec::with_capacity(entry.value.len() + SEAL_OVERHEAD_BYTES);
        sealed.extend_from_slice(&salt);
        sealed.extend_from_slice(&entry.value);
        let tag = Self::record_key(key, &salt)
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key([0; NONCE_LEN]),
                Aad::from(associated(&entry.key, entry.revision)),
                &mut sealed[SALT_BYTES..],
            )
            .expect("values are far smaller than the cipher's limit");
        sealed.extend_from_slice(tag.as_ref());
        Some(sealed)
    }

    /// A sealed value in the clear.
    pub(super) fn open(&self, name: &str, revision: u64, sealed: &[u8]) -> Result<Vec<u8>, &'static str> {
        let key = self.key.as_ref().ok_or("no key file is given")?;
        let (salt, sealed) = sealed.split_at_checked(SALT_BYTES).ok_or("an encrypted object is too short")?;
        let mut value = sealed.to_vec();
        let length = Self::record_key(key, salt)
            .open_in_place(
                Nonce::assume_unique_for_key([0; NONCE_LEN]),
                Aad::from(associated(name, revision)),
                &mut value,
            )
            .map_err(|_| "the key in the key file is not theirs")?
            .len();
        value.truncate(length);
        value.shrink_to_fit();
        Ok(value)
    }
}

fn associated(key: &str, revision: u64) -> Vec<u8> {
    [&revision.to_le_bytes(), key.as_bytes()].concat()
}

fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    if text.len() != 2 * KEY_BYTES {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    text.chunks(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}
