// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Certificates of tests.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use reference_vmm::migration::tls::TlsFiles;

/// A host's certificate, for these names, its key, and the authority's, in a folder that is there.
pub fn files(folder: &Path, names: &[&str]) -> TlsFiles {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let params = CertificateParams::new(names).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    TlsFiles {
        cert: write("cert", certificate.pem()),
        key: write("key", key.serialize_pem()),
        ca: write("ca", issuer.pem()),
        name: None,
    }
}
