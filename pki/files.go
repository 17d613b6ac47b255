package pki

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// maxFile bounds a PEM file, in bytes.
const maxFile = 1 << 20

// Types of PEM blocks.
const (
	pemCert = "CERTIFICATE"
	pemKey  = "PRIVATE KEY"
)

// EncodeChain renders certificates, DER, as PEM.
func EncodeChain(chain [][]byte) []byte {
	var out []byte
	for _, der := range chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: der})...)
	}
	return out
}

// EncodeKey renders a private key as PEM (PKCS #8).
func EncodeKey(key crypto.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der}), nil
}

// CertPEM renders an authority's certificate.
func (a *Authority) CertPEM() []byte { return EncodeChain([][]byte{a.Cert.Raw}) }

// KeyPEM renders an authority's private key.
func (a *Authority) KeyPEM() ([]byte, error) { return EncodeKey(a.key) }

// Modes of files.
const (
	ModeKey  os.FileMode = 0o600
	ModeCert os.FileMode = 0o644
)

// Create writes a new file whole and durably; one that exists is an error and stays as it is.
func Create(path string, content []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		if errors.Is(err, os.ErrExist) {
			return fmt.Errorf("%s exists already: it is not overwritten; move it away or choose another folder", path)
		}
		return err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// Replace puts content in the place of a file, so that a reader finds the old or the new one whole. The file belongs to
// whom the folder belongs to, where this process may give it away.
func Replace(path string, content []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".new-*") // 0600 from the start
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), chownAs(f, filepath.Dir(path)), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// chownAs gives a file to the owner of a folder.
func chownAs(f *os.File, dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid != 0 {
		return f.Chown(int(owner.Uid), int(owner.Gid))
	}
	return nil
}

// readPEM reads the blocks of a file.
func readPEM(path string) ([]*pem.Block, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, fmt.Errorf("%s is no file of at most %d bytes", path, maxFile)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var blocks []*pem.Block
	for {
		var b *pem.Block
		if b, raw = pem.Decode(raw); b == nil {
			break
		}
		blocks = append(blocks, b)
	}
	if len(blocks) == 0 {
		return nil, fmt.Errorf("%s holds no PEM: want text that begins with -----BEGIN", path)
	}
	return blocks, nil
}

// ReadCerts reads the certificates of a PEM file; there is at least one.
func ReadCerts(path string) ([]*x509.Certificate, error) {
	blocks, err := readPEM(path)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for _, b := range blocks {
		if b.Type != pemCert {
			continue
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%s holds a %s, but no certificate", path, strings.ToLower(blocks[0].Type))
	}
	return certs, nil
}

// ReadKey reads the private key of a PEM file, which other users of the host must not be able to read.
func ReadKey(path string) (crypto.Signer, error) {
	blocks, err := readPEM(path)
	if err != nil {
		return nil, err
	}
	for _, b := range blocks {
		var key any
		var err error
		switch b.Type {
		case pemKey:
			key, err = x509.ParsePKCS8PrivateKey(b.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(b.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(b.Bytes)
		default:
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		s, ok := key.(crypto.Signer)
		if !ok {
			continue
		}
		if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o007 != 0 {
			return nil, fmt.Errorf("%s can be read by every user of this host (mode %04o): run chmod 600 %s; if others may have read it, make a new one", path, info.Mode().Perm(), path)
		}
		return s, nil
	}
	return nil, fmt.Errorf("%s holds no private key that can sign, unencrypted: want PEM of PKCS #8, SEC 1 or PKCS #1", path)
}

// LoadAuthority reads an authority from its files and reports every fault. A node CA is known by its name constraints.
func LoadAuthority(certFile, keyFile string) (*Authority, error) {
	certs, err1 := ReadCerts(certFile)
	key, err2 := ReadKey(keyFile)
	if err := errors.Join(err1, err2); err != nil {
		return nil, fmt.Errorf("CA: %w", err)
	}
	cert := certs[0]
	a := &Authority{Cert: cert, key: key}
	var faults []error
	if !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		faults = append(faults, fmt.Errorf("%s is no CA", certFile))
	}
	if !sameKey(cert.PublicKey, key.Public()) {
		faults = append(faults, fmt.Errorf("%s is not the key of %s", keyFile, certFile))
	}
	const want = "%s is no CA of rxvision: its name constraints do not say for which region it is"
	switch d := cert.PermittedURIDomains; {
	case len(d) == 0:
		faults = append(faults, fmt.Errorf(want, certFile))
	case strings.HasPrefix(d[0], "."):
		a.Region = strings.TrimSuffix(strings.TrimPrefix(d[0], "."), "."+domain)
	default:
		a.Node, a.chain = true, []*x509.Certificate{cert}
		_, rest, _ := strings.Cut(d[0], ".")
		a.Region = strings.TrimSuffix(rest, "."+domain)
	}
	if len(faults) == 0 && CheckRegion(a.Region) != nil {
		faults = append(faults, fmt.Errorf(want, certFile))
	}
	if err := errors.Join(faults...); err != nil {
		return nil, fmt.Errorf("CA: %w", err)
	}
	return a, nil
}

// EnsureKey reads a key file, which it makes first if it is not there.
func EnsureKey(path string) (crypto.Signer, error) {
	if !exists(path) {
		key, err := NewKey()
		if err != nil {
			return nil, err
		}
		text, err := EncodeKey(key)
		if err != nil {
			return nil, err
		}
		if err := Replace(path, text, ModeKey); err != nil {
			return nil, fmt.Errorf("store the key: %w", err)
		}
	}
	return ReadKey(path)
}

// CopyIfChanged makes the file to hold what from holds.
func CopyIfChanged(from, to string) error {
	want, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if is, err := os.ReadFile(to); err == nil && bytes.Equal(is, want) {
		return nil
	}
	return Replace(to, want, ModeCert)
}
