package pki

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"time"
)

const (
	// skew is how far a certificate's beginning lies back: a process whose clock is behind by less accepts what has just
	// been signed. It costs nothing, as a certificate's end counts from now.
	skew = time.Hour
	// maxCN bounds a common name (RFC 5280, A.1: ub-common-name).
	maxCN = 64
	// maxCSR bounds a certificate request, in bytes.
	maxCSR = 8 << 10
)

// Authority signs certificates: a region's CA, or its node CA.
type Authority struct {
	Cert   *x509.Certificate
	Region string
	Node   bool // may sign nodes, workers and gateways only
	key    crypto.Signer
	chain  []*x509.Certificate // what goes with its certificates besides the CA itself
}

// NewKey makes a private key: ECDSA on P-256, which every TLS client can verify.
func NewKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// NewCA makes a region's CA.
func NewCA(region string, life time.Duration, now time.Time) (*Authority, error) {
	if err := CheckRegion(region); err != nil {
		return nil, err
	}
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	cert, err := sign(&x509.Certificate{
		Subject:   pkix.Name{CommonName: cn("rxvision CA of region " + region)},
		NotBefore: now.Add(-skew), NotAfter: now.Add(life),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true, MaxPathLen: 1,
		PermittedURIDomains: []string{"." + region + "." + domain}, PermittedDNSDomainsCritical: true,
	}, nil, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &Authority{Cert: cert, Region: region, key: key}, nil
}

// NewNodeCA makes the CA of nodes, workers and gateways below a region's CA.
func (a *Authority) NewNodeCA(life time.Duration, now time.Time) (*Authority, error) {
	if a.Node {
		return nil, errors.New("a node CA cannot sign another CA: use the region's CA")
	}
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	_, v4, _ := net.ParseCIDR("0.0.0.0/0") // constants
	_, v6, _ := net.ParseCIDR("::/0")
	template := &x509.Certificate{
		Subject:   pkix.Name{CommonName: cn("rxvision node CA of region " + a.Region)},
		NotBefore: later(now.Add(-skew), a.Cert.NotBefore), NotAfter: earlier(now.Add(life), a.Cert.NotAfter),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		ExcludedDNSDomains: []string{""}, ExcludedIPRanges: []*net.IPNet{v4, v6}, ExcludedEmailAddresses: []string{""},
		PermittedDNSDomainsCritical: true,
	}
	for _, r := range nodeRoles {
		template.PermittedURIDomains = append(template.PermittedURIDomains, host(r, a.Region))
	}
	cert, err := sign(template, a.Cert, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	return &Authority{Cert: cert, Region: a.Region, Node: true, key: key, chain: []*x509.Certificate{cert}}, nil
}

// Names are what HTTPS clients look for in a certificate besides the identity.
type Names struct {
	DNS []string
	IPs []net.IP
}

// Issue signs a certificate for an identity's public key that lives until now+life, or as long as the authority if that is
// shorter. The chain is DER, leaf first, without the region's CA.
func (a *Authority) Issue(id Identity, names Names, pub crypto.PublicKey, life time.Duration, now time.Time) (chain [][]byte, err error) {
	if err := id.Check(); err != nil {
		return nil, err
	}
	if id.Region != a.Region {
		return nil, fmt.Errorf("the CA is of region %s and cannot sign %s", a.Region, id)
	}
	if a.Node && (!slices.Contains(nodeRoles, id.Role) || len(names.DNS)+len(names.IPs) > 0) {
		return nil, fmt.Errorf("a node CA signs %s only, without DNS names and addresses: %s is for the region's CA", roleList(nodeRoles), id)
	}
	if !now.Before(a.Cert.NotAfter) {
		return nil, fmt.Errorf("the CA %q expired at %s: make a new one", a.Cert.Subject.CommonName, a.Cert.NotAfter.UTC().Format(time.DateTime))
	}
	leaf, err := sign(&x509.Certificate{
		Subject:   pkix.Name{CommonName: cn(string(id.Role) + " " + id.Name)},
		NotBefore: later(now.Add(-skew), a.Cert.NotBefore), NotAfter: earlier(now.Add(life), a.Cert.NotAfter),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: usages(id.Role), BasicConstraintsValid: true,
		URIs: []*url.URL{id.URI()}, DNSNames: names.DNS, IPAddresses: names.IPs,
	}, a.Cert, pub, a.key)
	if err != nil {
		return nil, err
	}
	chain = [][]byte{leaf.Raw}
	for _, c := range a.chain {
		chain = append(chain, c.Raw)
	}
	return chain, nil
}

// usages are what a role does: servers and gateways listen and dial, nodes and operators dial, workers listen.
func usages(r Role) []x509.ExtKeyUsage {
	switch r {
	case RoleServer, RoleGateway:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	case RoleWorker:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	default:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
}

// ServerNames are the names that a server's certificate carries for HTTPS clients such as the nomad CLI: those that it was
// given, localhost and its addresses, and server.REGION.rxvision.
func ServerNames(region string, dns []string, ips []net.IP) Names {
	return Names{
		DNS: append([]string{host(RoleServer, region), "localhost"}, dns...),
		IPs: append([]net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}, ips...),
	}
}

// sign completes a template and has parent sign it; parent nil: itself.
func sign(template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, template, cmp.Or(parent, template), pub, key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

func cn(s string) string { return s[:min(len(s), maxCN)] }

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// NewCSR asks for a certificate of key's public half (PKCS #10, DER). Who it is for is the authority's to say, so the
// request names nobody; its signature proves that the asker holds the key.
func NewCSR(key crypto.Signer) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
}

// CSRKey verifies a request and gives the public key that it is for: ECDSA on P-256.
func CSRKey(csr []byte) (*ecdsa.PublicKey, error) {
	if len(csr) > maxCSR {
		return nil, fmt.Errorf("the certificate request has %d bytes; at most %d", len(csr), maxCSR)
	}
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	pub, ok := r.PublicKey.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, errors.New("certificate request: the key is not ECDSA on P-256")
	}
	return pub, nil
}

// KeyHash names a public key: the SHA-256 of its SubjectPublicKeyInfo in hex, "" for one that cannot be encoded.
func KeyHash(pub crypto.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

func sameKey(a, b crypto.PublicKey) bool {
	x, err1 := x509.MarshalPKIXPublicKey(a)
	y, err2 := x509.MarshalPKIXPublicKey(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}
