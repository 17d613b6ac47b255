package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// region is a CA with its node CA and a folder for files.
type region struct {
	testing.TB
	name         string
	ca, node     *Authority
	dir, caFile  string
	nodeCA, nKey string
}

func newRegion(tb testing.TB, name string) *region {
	tb.Helper()
	now := time.Now()
	ca, err := NewCA(name, time.Hour, now)
	must(tb, err)
	node, err := ca.NewNodeCA(time.Hour, now)
	must(tb, err)
	r := &region{TB: tb, name: name, ca: ca, node: node, dir: tb.TempDir()}
	r.caFile, r.nodeCA, r.nKey = r.path("ca.pem"), r.path("node-ca.pem"), r.path("node-ca-key.pem")
	must(tb, Create(r.caFile, ca.CertPEM(), ModeCert))
	must(tb, Create(r.nodeCA, node.CertPEM(), ModeCert))
	key, err := node.KeyPEM()
	must(tb, err)
	must(tb, Create(r.nKey, key, ModeKey))
	return r
}

func (r *region) path(name string) string { return filepath.Join(r.dir, name) }

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// issue writes a certificate and key for an identity and gives their files.
func (r *region) issue(a *Authority, role Role, name string, life time.Duration) (cert, key string) {
	r.Helper()
	k, err := NewKey()
	must(r, err)
	names := Names{}
	if role == RoleServer {
		names = ServerNames(r.name, nil, nil)
	}
	chain, err := a.Issue(Identity{role, r.name, name}, names, k.Public(), life, time.Now())
	must(r, err)
	text, err := EncodeKey(k)
	must(r, err)
	return r.write(string(role)+"-"+name, EncodeChain(chain), text)
}

func (r *region) write(name string, chain, keyText []byte) (cert, key string) {
	r.Helper()
	cert, key = r.path(name+".pem"), r.path(name+"-key.pem")
	must(r, Replace(cert, chain, ModeCert))
	must(r, Replace(key, keyText, ModeKey))
	return cert, key
}

// forge signs a template by a CA's key without this package's own checks.
func (r *region) forge(name string, by *Authority, template *x509.Certificate) *Material {
	r.Helper()
	k, err := NewKey()
	must(r, err)
	template.Subject = pkix.Name{CommonName: "forged"}
	if template.NotAfter.IsZero() {
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	parent, signer := template, any(k)
	var rest []*x509.Certificate
	if by != nil {
		parent, signer, rest = by.Cert, by.key, by.chain
	}
	if by == nil {
		leaf, err := sign(template, nil, k.Public(), k)
		must(r, err)
		return forged(r, leaf, rest, k)
	}
	_ = signer
	leaf, err := sign(template, parent, k.Public(), by.key)
	must(r, err)
	return forged(r, leaf, rest, k)
}

// forged is Material that shows a certificate that Load would refuse.
func forged(r *region, leaf *x509.Certificate, rest []*x509.Certificate, key any) *Material {
	c := &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	for _, x := range rest {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	m := &Material{cfg: Config{Region: r.name}, log: slog.New(slog.DiscardHandler), refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "x"})}
	m.current.Store(&loaded{pool: pool([]*x509.Certificate{r.ca.Cert}), cert: c})
	return m
}

func (r *region) material(role Role, name string) *Material {
	r.Helper()
	by := r.ca
	if role == RoleNode || role == RoleWorker {
		by = r.node
	}
	cert, key := r.issue(by, role, name, time.Hour)
	m, err := Load(Config{CA: r.caFile, Cert: cert, Key: key, Region: r.name, Role: role, Use: "test"})
	must(r, err)
	return m
}

func counted(c prometheus.Counter) float64 {
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		panic(err)
	}
	return m.Counter.GetValue()
}

func uri(tb testing.TB, s string) []*url.URL {
	tb.Helper()
	u, err := url.Parse(s)
	must(tb, err)
	return []*url.URL{u}
}

// shake connects two configurations over a socket and says what each side found: who the server saw, and both errors.
func shake(tb testing.TB, server, client *tls.Config) (seen Identity, serverErr, clientErr error) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(tb, err)
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		raw, err := l.Accept()
		if err != nil {
			serverErr = err
			return
		}
		conn := tls.Server(raw, server)
		defer conn.Close()
		if serverErr = conn.Handshake(); serverErr != nil {
			return
		}
		seen, _ = PeerIdentity(conn.ConnectionState())
		_, serverErr = conn.Write([]byte{1})
	}()
	raw, err := net.Dial("tcp", l.Addr().String())
	must(tb, err)
	conn := tls.Client(raw, client)
	defer conn.Close()
	if clientErr = conn.Handshake(); clientErr == nil { // in TLS 1.3 a refusal by the server comes with the first read
		_, clientErr = io.ReadFull(conn, make([]byte, 1))
	}
	conn.Close()
	<-done
	return seen, serverErr, clientErr
}

func TestIdentityIsReadStrictly(t *testing.T) {
	r := newRegion(t, "global")
	for _, c := range []struct {
		uris []string
		ok   bool
	}{
		{[]string{"spiffe://node.global.rxvision/n-1"}, true},
		{nil, false},
		{[]string{"spiffe://node.global.rxvision/n-1", "spiffe://node.global.rxvision/n-2"}, false},
		{[]string{"spiffe://root.global.rxvision/n-1"}, false},
		{[]string{"spiffe://node.global.rxvision.example/n-1"}, false},
		{[]string{"spiffe://x.node.global.rxvision/n-1"}, false},
		{[]string{"spiffe://node.global.rxvision/a/b"}, false},
		{[]string{"spiffe://node.global.rxvision/"}, false},
		{[]string{"spiffe://node.global.rxvision"}, false},
		{[]string{"spiffe://node.global.rxvision/n-1?x=y"}, false},
		{[]string{"spiffe://node.global.rxvision/n-1#f"}, false},
		{[]string{"spiffe://user@node.global.rxvision/n-1"}, false},
		{[]string{"spiffe://node.global.rxvision:443/n-1"}, false},
		{[]string{"spiffe://NODE.global.rxvision/n-1"}, false},
		{[]string{"https://node.global.rxvision/n-1"}, false},
		{[]string{"spiffe://node.global.rxvision/%6e-1"}, false},
	} {
		cert := &x509.Certificate{}
		for _, s := range c.uris {
			cert.URIs = append(cert.URIs, uri(t, s)...)
		}
		id, err := IdentityOf(cert)
		if c.ok != (err == nil) || !c.ok && !errors.Is(err, ErrNoIdentity) {
			t.Errorf("%q: %v, %v", c.uris, id, err)
		}
		if c.ok && (id != Identity{RoleNode, "global", "n-1"}) {
			t.Errorf("%q: %v", c.uris, id)
		}
	}
	if _, err := IdentityOf(r.ca.Cert); !errors.Is(err, ErrNoIdentity) {
		t.Errorf("a CA is somebody: %v", err)
	}
	err := Identity{"root", "Global.Two", "../x"}.Check()
	for _, want := range []string{`role "root"`, `region "Global.Two"`, `name "../x"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("faults %v lack %s", err, want)
		}
	}
}

// TestRoles connects everybody to everybody's listener.
func TestRoles(t *testing.T) {
	r := newRegion(t, "global")
	all := map[Role]*Material{}
	for _, role := range Roles {
		all[role] = r.material(role, "x-1")
	}
	listens := map[Role]bool{RoleServer: true, RoleGateway: true, RoleWorker: true}
	dials := map[Role]bool{RoleServer: true, RoleNode: true, RoleGateway: true, RoleOperator: true}
	for _, server := range Roles {
		for _, accepted := range Roles {
			for _, client := range Roles {
				seen, sErr, cErr := shake(t, all[server].Server(Only(accepted)), all[client].Client(Only(server)))
				want := listens[server] && dials[client] && accepted == client
				if got := sErr == nil && cErr == nil; got != want {
					t.Fatalf("%s that accepts %s and %s: server %v, client %v; want accepted %v", server, accepted, client, sErr, cErr, want)
				}
				if want && (seen != Identity{client, "global", "x-1"}) {
					t.Errorf("%s sees %v instead of %s", server, seen, client)
				}
			}
		}
	}
	// Who expects another role, or another name of it, does not go on.
	for _, peers := range []Peers{Only(RoleWorker), Only(RoleGateway, RoleOperator), Exactly(RoleServer, "x-2")} {
		if _, _, err := shake(t, all[RoleServer].Server(Only(RoleNode)), all[RoleNode].Client(peers)); err == nil {
			t.Errorf("a node that expects %+v takes server x-1", peers.Roles)
		}
	}
	if _, sErr, cErr := shake(t, all[RoleServer].Server(Only(RoleNode)), all[RoleNode].Client(Exactly(RoleServer, "x-1"))); sErr != nil || cErr != nil {
		t.Errorf("exactly this server: %v, %v", sErr, cErr)
	}
}

func TestAnonymous(t *testing.T) {
	r := newRegion(t, "global")
	server, node := r.material(RoleServer, "s1"), r.material(RoleNode, "n1")
	peers := Only(RoleNode)
	if _, err, _ := shake(t, server.Server(peers), node.Anonymous(Only(RoleServer))); err == nil {
		t.Error("a client without a certificate came in")
	}
	peers.Anonymous = true
	seen, sErr, cErr := shake(t, server.Server(peers), node.Anonymous(Only(RoleServer)))
	if sErr != nil || cErr != nil || seen != (Identity{}) {
		t.Errorf("anonymous: %v %v %v", seen, sErr, cErr)
	}
	if seen, _, _ := shake(t, server.Server(peers), node.Client(Only(RoleServer))); seen.Role != RoleNode {
		t.Errorf("a node is seen as %v", seen)
	}
	if _, err, _ := shake(t, server.Server(peers), r.material(RoleGateway, "g1").Client(Only(RoleServer))); err == nil {
		t.Error("a wrong certificate is better than none")
	}
	if _, _, err := shake(t, server.Server(peers), node.Anonymous(Only(RoleGateway))); err == nil {
		t.Error("an anonymous client takes any server")
	}
}

// TestForged shows certificates that this package would not sign, as whoever has stolen a key could, to servers and clients.
func TestForged(t *testing.T) {
	r, other, elsewhere := newRegion(t, "global"), newRegion(t, "global"), newRegion(t, "eu")
	server, gateway := r.material(RoleServer, "s1"), r.material(RoleGateway, "g1")
	everyone := Only(Roles...)
	for name, bad := range map[string]*Material{
		"a server by the node CA":          r.forge("a", r.node, &x509.Certificate{URIs: uri(t, "spiffe://server.global.rxvision/s9")}),
		"an operator by the node CA":       r.forge("b", r.node, &x509.Certificate{URIs: uri(t, "spiffe://operator.global.rxvision/me")}),
		"another region by the node CA":    r.forge("c", r.node, &x509.Certificate{URIs: uri(t, "spiffe://node.eu.rxvision/n1")}),
		"another region by the CA":         r.forge("d", r.ca, &x509.Certificate{URIs: uri(t, "spiffe://node.eu.rxvision/n1")}),
		"a node with a DNS name":           r.forge("e", r.node, &x509.Certificate{URIs: uri(t, "spiffe://node.global.rxvision/n1"), DNSNames: []string{"server.global.rxvision"}}),
		"a node with an address":           r.forge("f", r.node, &x509.Certificate{URIs: uri(t, "spiffe://node.global.rxvision/n1"), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}),
		"a subdomain of a node's":          r.forge("g", r.node, &x509.Certificate{URIs: uri(t, "spiffe://server.node.global.rxvision/n1")}),
		"nobody":                           r.forge("h", r.ca, &x509.Certificate{}),
		"two at once":                      r.forge("i", r.ca, &x509.Certificate{URIs: append(uri(t, "spiffe://node.global.rxvision/n1"), uri(t, "spiffe://server.global.rxvision/s1")...)}),
		"self-signed":                      r.forge("j", nil, &x509.Certificate{URIs: uri(t, "spiffe://node.global.rxvision/n1")}),
		"another CA of the same name":      r.forge("k", other.ca, &x509.Certificate{URIs: uri(t, "spiffe://server.global.rxvision/s1")}),
		"another node CA of the same name": r.forge("l", other.node, &x509.Certificate{URIs: uri(t, "spiffe://node.global.rxvision/n1")}),
		"the CA of another region":         r.forge("m", elsewhere.ca, &x509.Certificate{URIs: uri(t, "spiffe://server.global.rxvision/s1")}),
		"an expired one":                   r.forge("n", r.ca, &x509.Certificate{URIs: uri(t, "spiffe://node.global.rxvision/n1"), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(-time.Second)}),
		"one of tomorrow":                  r.forge("o", r.ca, &x509.Certificate{URIs: uri(t, "spiffe://node.global.rxvision/n1"), NotBefore: time.Now().Add(time.Hour), NotAfter: time.Now().Add(2 * time.Hour)}),
		"the CA itself":                    forged(r, r.ca.Cert, nil, r.ca.key),
		"the node CA itself":               forged(r, r.node.Cert, nil, r.node.key),
		"a CA by the node CA, below it a node": func() *Material {
			k, err := NewKey()
			must(t, err)
			sub, err := sign(&x509.Certificate{
				Subject: pkix.Name{CommonName: "sub"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
				IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
			}, r.node.Cert, k.Public(), r.node.key)
			must(t, err)
			return r.forge("p", &Authority{Cert: sub, key: k, chain: []*x509.Certificate{sub, r.node.Cert}}, &x509.Certificate{URIs: uri(t, "spiffe://node.global.rxvision/n1")})
		}(),
	} {
		if id, err, _ := shake(t, server.Server(everyone), bad.Client(everyone)); err == nil {
			t.Errorf("%s comes in as %v", name, id)
		}
		anyone := everyone
		anyone.Anonymous = true
		if _, err, _ := shake(t, server.Server(anyone), bad.Client(everyone)); err == nil {
			t.Errorf("%s comes in where anonymous clients may", name)
		}
		if _, _, err := shake(t, bad.Server(everyone), gateway.Client(everyone)); err == nil {
			t.Errorf("%s is taken for a server", name)
		}
	}
	// Sound ones made in the same way come in: the test can fail.
	good := r.forge("q", r.node, &x509.Certificate{URIs: uri(t, "spiffe://node.global.rxvision/n1")})
	if _, sErr, cErr := shake(t, server.Server(everyone), good.Client(everyone)); sErr != nil || cErr != nil {
		t.Errorf("a sound one: %v %v", sErr, cErr)
	}
	if n := counted(server.refused); n == 0 {
		t.Error("no refusal was counted")
	}
	// An operator's HTTPS client, which looks at names only, takes a server and none of what a node CA can sign.
	https := func(m *Material) error {
		roots := pool([]*x509.Certificate{r.ca.Cert})
		_, _, err := shake(t, m.HTTPS(Peers{}), &tls.Config{RootCAs: roots, ServerName: "localhost"})
		return err
	}
	if err := https(server); err != nil {
		t.Errorf("HTTPS to a server: %v", err)
	}
	if err := https(r.forge("r", r.node, &x509.Certificate{URIs: uri(t, "spiffe://node.global.rxvision/n1"), DNSNames: []string{"localhost"}})); err == nil {
		t.Error("the node CA made an HTTPS server")
	}
	if err := https(r.forge("s", r.node, &x509.Certificate{DNSNames: []string{"localhost"}})); err == nil {
		t.Error("the node CA made an HTTPS server that is nobody")
	}
}

func TestIssueRefuses(t *testing.T) {
	r := newRegion(t, "global")
	k, err := NewKey()
	must(t, err)
	now := time.Now()
	for name, do := range map[string]func() error{
		"a node CA signs %s": func() error {
			_, err := r.node.Issue(Identity{RoleServer, "global", "s1"}, Names{}, k.Public(), time.Hour, now)
			return err
		},
		"without DNS names": func() error {
			_, err := r.node.Issue(Identity{RoleNode, "global", "n1"}, Names{DNS: []string{"x"}}, k.Public(), time.Hour, now)
			return err
		},
		"cannot sign": func() error {
			_, err := r.ca.Issue(Identity{RoleServer, "eu", "s1"}, Names{}, k.Public(), time.Hour, now)
			return err
		},
		"expired at": func() error {
			_, err := r.ca.Issue(Identity{RoleServer, "global", "s1"}, Names{}, k.Public(), time.Hour, now.Add(2*time.Hour))
			return err
		},
		"cannot sign another CA": func() error { _, err := r.node.NewNodeCA(time.Hour, now); return err },
	} {
		if err := do(); err == nil || !strings.Contains(err.Error(), strings.ReplaceAll(name, "%s", "node, worker, gateway")) {
			t.Errorf("%s: %v", name, err)
		}
	}
	chain, err := r.node.Issue(Identity{RoleNode, "global", "n1"}, Names{}, k.Public(), 100*time.Hour, now)
	must(t, err)
	certs, err := ParseChain(chain)
	must(t, err)
	if len(certs) != 2 || certs[0].NotAfter.After(r.node.Cert.NotAfter) {
		t.Errorf("chain of %d, leaf outlives its CA: %v", len(certs), certs[0].NotAfter)
	}
	csr, err := NewCSR(k)
	must(t, err)
	if pub, err := CSRKey(csr); err != nil || KeyHash(pub) != KeyHash(k.Public()) {
		t.Errorf("request: %v", err)
	}
	csr[len(csr)-1] ^= 1
	if _, err := CSRKey(csr); err == nil {
		t.Error("a request with a broken signature is taken")
	}
}

func TestLoadReportsEveryFault(t *testing.T) {
	r, other := newRegion(t, "global"), newRegion(t, "global")
	sCert, sKey := r.issue(r.ca, RoleServer, "s1", time.Hour)
	nCert, nKey := r.issue(r.node, RoleNode, "n1", time.Hour)
	late := r.path("late.pem")
	k, err := NewKey()
	must(t, err)
	chain, err := r.ca.Issue(Identity{RoleServer, "global", "s1"}, Names{}, k.Public(), -time.Minute, time.Now())
	must(t, err)
	must(t, Create(late, EncodeChain(chain), ModeCert))
	open := r.path("open-key.pem")
	text, err := os.ReadFile(sKey)
	must(t, err)
	must(t, os.WriteFile(open, text, 0o600))
	must(t, os.Chmod(open, 0o644))
	junk := r.path("junk.pem")
	must(t, Create(junk, []byte("hello"), ModeCert))
	server := Config{CA: r.caFile, Cert: sCert, Key: sKey, Region: "global", Role: RoleServer}
	with := func(change func(*Config)) Config { c := server; change(&c); return c }
	for name, c := range map[string]struct {
		Config
		want []string
	}{
		"good":      {server, nil},
		"missing":   {Config{CA: r.path("no.pem"), Cert: r.path("no-cert.pem"), Key: r.path("no-key.pem"), Role: RoleServer}, []string{"no.pem", "no-cert.pem", "no-key.pem"}},
		"unnamed":   {Config{Role: RoleServer}, []string{"CA's file is missing", "certificate: its file is missing", "key: its file is missing"}},
		"mixed up":  {with(func(c *Config) { c.CA, c.Key = other.caFile, nKey }), []string{"is not signed by the CA", "is not the key of"}},
		"role":      {with(func(c *Config) { c.Cert, c.Key = nCert, nKey }), []string{"it is for role node; role server is needed here"}},
		"region":    {with(func(c *Config) { c.Region = "eu" }), []string{"it is for region global; this is region eu"}},
		"name":      {with(func(c *Config) { c.Name = "s2" }), []string{`it is for "s1"; this is "s2"`}},
		"late":      {with(func(c *Config) { c.Cert = late }), []string{"it expired at", "is not the key of"}},
		"open":      {with(func(c *Config) { c.Key = open }), []string{"chmod 600"}},
		"junk":      {with(func(c *Config) { c.CA, c.Cert, c.Key = junk, junk, junk }), []string{"CA: " + junk + " holds no PEM", "certificate: " + junk, "key: " + junk}},
		"exchanged": {with(func(c *Config) { c.CA, c.Cert, c.Key = sCert, sKey, r.caFile }), []string{"which is no CA", "holds a private key, but no certificate", "holds no private key"}},
	} {
		_, err := Load(c.Config)
		if (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q is not in:\n%v", name, want, err)
			}
		}
	}
}

func TestFilesAreNotOverwritten(t *testing.T) {
	r := newRegion(t, "global")
	before, err := os.ReadFile(r.nKey)
	must(t, err)
	if err := Create(r.nKey, []byte("x"), ModeKey); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("create over a file: %v", err)
	}
	after, err := os.ReadFile(r.nKey)
	must(t, err)
	info, err := os.Stat(r.nKey)
	must(t, err)
	if string(before) != string(after) || info.Mode().Perm() != 0o600 {
		t.Errorf("the key changed, or its mode is %v", info.Mode())
	}
	must(t, Replace(r.nKey, after, ModeKey))
	if info, err := os.Stat(r.nKey); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("after replacement: %v %v", info.Mode(), err)
	}
	for _, files := range [][2]string{{r.nodeCA, r.nKey}} {
		a, err := LoadAuthority(files[0], files[1])
		if err != nil || a.Region != "global" || !a.Node {
			t.Errorf("%v: %+v %v", files, a, err)
		}
	}
	if _, err := LoadAuthority(r.caFile, r.nKey); err == nil || !strings.Contains(err.Error(), "is not the key of") {
		t.Errorf("a CA with another's key: %v", err)
	}
}

// TestReload changes files under a server: connections stay, new ones see the new certificate, a bad file changes nothing.
func TestReload(t *testing.T) {
	r, next := newRegion(t, "global"), newRegion(t, "global")
	cert, key := r.issue(r.ca, RoleServer, "s1", time.Hour)
	reg := prometheus.NewRegistry()
	m, err := Load(Config{CA: r.caFile, Cert: cert, Key: key, Region: "global", Role: RoleServer, Use: "test", Registerer: reg})
	must(t, err)
	l, err := tls.Listen("tcp", "127.0.0.1:0", m.Server(Only(RoleNode, RoleServer)))
	must(t, err)
	defer l.Close()
	go func() { // echo
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	serial := func(c *tls.Conn) string { return c.ConnectionState().PeerCertificates[0].SerialNumber.String() }
	speak := func(c *tls.Conn) error {
		if _, err := c.Write([]byte("ping")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 4))
		return err
	}
	dial := func(m *Material) (*tls.Conn, error) {
		c, err := tls.Dial("tcp", l.Addr().String(), m.Client(Only(RoleServer)))
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { c.Close() })
		return c, speak(c)
	}
	node := r.material(RoleNode, "n1")
	first, err := dial(node)
	must(t, err)

	// Half a change: the certificate is there, its key not yet.
	k, err := NewKey()
	must(t, err)
	chain, err := r.ca.Issue(Identity{RoleServer, "global", "s1"}, Names{}, k.Public(), time.Hour, time.Now())
	must(t, err)
	must(t, Replace(cert, EncodeChain(chain), ModeCert))
	m.check(time.Now())
	same, err := dial(node)
	must(t, err)
	if serial(same) != serial(first) || counted(m.reloads.WithLabelValues("failed")) != 1 {
		t.Error("half a change was taken")
	}
	m.check(time.Now())
	if n := counted(m.reloads.WithLabelValues("failed")); n != 1 {
		t.Errorf("an unchanged bad file was read %v times", n)
	}
	text, err := EncodeKey(k)
	must(t, err)
	must(t, Replace(key, text, ModeKey))
	m.check(time.Now())
	second, err := dial(node)
	must(t, err)
	if serial(second) == serial(first) {
		t.Error("the new certificate is not shown")
	}
	must(t, speak(first))

	// The CA is replaced by way of a file with both.
	stranger := next.material(RoleNode, "n2")
	if _, err := dial(stranger); err == nil {
		t.Error("a node of a CA that is not there yet came in")
	}
	must(t, Replace(r.caFile, append(r.ca.CertPEM(), next.ca.CertPEM()...), ModeCert))
	m.check(time.Now())
	stranger.current.Load().pool.AddCert(r.ca.Cert)
	if _, err := dial(stranger); err != nil {
		t.Errorf("with both CAs: %v", err)
	}
	if _, err := dial(node); err != nil {
		t.Errorf("with both CAs, a node of the old: %v", err)
	}
	must(t, os.Remove(r.caFile))
	if err := m.Reload(); err == nil || !strings.Contains(err.Error(), "are not used") {
		t.Errorf("reload without a CA: %v", err)
	}
	if _, err := dial(node); err != nil {
		t.Errorf("after a file went: %v", err)
	}
	must(t, speak(first))
	got, err := reg.Gather()
	must(t, err)
	found := map[string]bool{}
	for _, f := range got {
		if f.GetName() == "rxvision_tls_certificate_expiry_seconds" {
			for _, x := range f.Metric {
				for _, l := range x.Label {
					if v := x.Gauge.GetValue(); v > 0 && v <= 3600 {
						found[l.GetName()+"="+l.GetValue()] = true
					}
				}
			}
		}
	}
	if !found["certificate=own"] || !found["certificate=ca"] || !found["use=test"] {
		t.Errorf("expiry metrics: %v", found)
	}
}

func TestHTTPS(t *testing.T) {
	r := newRegion(t, "global")
	server, operator := r.material(RoleServer, "s1"), r.material(RoleOperator, "me")
	for _, c := range []struct {
		peers  Peers
		client func() *tls.Config
		ok     bool
	}{
		{Peers{}, func() *tls.Config { return &tls.Config{} }, true},
		{Only(RoleOperator), func() *tls.Config { return &tls.Config{} }, false},
		{Only(RoleOperator), func() *tls.Config { return &tls.Config{Certificates: []tls.Certificate{*operator.current.Load().cert}} }, true},
	} {
		l, err := tls.Listen("tcp", "127.0.0.1:0", server.HTTPS(c.peers))
		must(t, err)
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok")) }), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
		done := make(chan struct{})
		go func() { defer close(done); _ = srv.Serve(l) }()
		cfg := c.client()
		cfg.RootCAs = pool([]*x509.Certificate{r.ca.Cert})
		transport := &http.Transport{TLSClientConfig: cfg}
		res, err := (&http.Client{Transport: transport}).Get("https://" + l.Addr().String())
		if (err == nil) != c.ok {
			t.Errorf("%+v: %v", c.peers.Roles, err)
		}
		if err == nil {
			res.Body.Close()
		}
		transport.CloseIdleConnections()
		srv.Close()
		<-done
	}
}

// remote signs what a Holder asks for, as servers would.
type remote struct {
	r                 *region
	life              time.Duration
	enrolled, renewed chan []byte // requests; closed channels refuse
	fail              error
	as                Identity // instead of the holder's own, when set
}

func (f *remote) sign(csr []byte) ([][]byte, error) {
	if f.fail != nil {
		return nil, f.fail
	}
	pub, err := CSRKey(csr)
	if err != nil {
		return nil, err
	}
	id := Identity{RoleNode, "global", "n1"}
	if f.as != (Identity{}) {
		id = f.as
	}
	return f.r.node.Issue(id, Names{}, pub, f.life, time.Now())
}

func (f *remote) Enroll(_ context.Context, _ *tls.Config, csr []byte) ([][]byte, error) {
	f.enrolled <- csr
	return f.sign(csr)
}

func (f *remote) Renew(_ context.Context, _ *tls.Config, csr []byte, _ [][]byte) ([][]byte, error) {
	select {
	case f.renewed <- csr:
	default:
	}
	return f.sign(csr)
}

func TestHolder(t *testing.T) {
	r := newRegion(t, "global")
	f := &remote{r: r, life: 3 * time.Second, enrolled: make(chan []byte, 10), renewed: make(chan []byte, 10)}
	cfg := HolderConfig{Dir: r.path("identity"), CA: r.caFile, Identity: Identity{RoleNode, "global", "n1"}, Remote: f}
	h, err := OpenHolder(cfg)
	must(t, err)
	for _, bad := range []Identity{{RoleNode, "global", "n2"}, {RoleGateway, "global", "n1"}} {
		f.as = bad
		if err := h.Ensure(t.Context()); err == nil || h.Valid() {
			t.Errorf("a certificate for %s was taken: %v", bad, err)
		}
	}
	f.as = Identity{}
	key, err := os.ReadFile(filepath.Join(cfg.Dir, keyName))
	must(t, err)
	must(t, h.Ensure(t.Context()))
	must(t, h.Ensure(t.Context())) // nothing to do
	if len(f.enrolled) != 3 || !h.Valid() || h.Material().Identity() != cfg.Identity {
		t.Fatalf("%d enrolments, valid %v, %s", len(f.enrolled), h.Valid(), h.Material().Identity())
	}
	for path, want := range map[string]os.FileMode{cfg.Dir: 0o700, filepath.Join(cfg.Dir, keyName): 0o600, filepath.Join(cfg.Dir, certName): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v (%v)", path, info.Mode().Perm(), want, err)
		}
	}
	// It renews by itself, again and again, with the same key.
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- h.Run(ctx) }()
	first := h.Material().Leaf()
	for range 2 {
		csr := <-f.renewed
		if pub, err := CSRKey(csr); err != nil || KeyHash(pub) != KeyHash(first.PublicKey) {
			t.Errorf("renewal with another key (%v)", err)
		}
	}
	cancel()
	must(t, <-done)
	if h.Material().Leaf().SerialNumber.Cmp(first.SerialNumber) == 0 {
		t.Error("the certificate is still the first")
	}
	// Another process goes on with key and certificate; expired, it renews; where that is refused, it enrols again.
	f.life = time.Hour
	for h.Valid() {
		time.Sleep(10 * time.Millisecond)
	}
	again, err := OpenHolder(cfg)
	must(t, err)
	if again.Valid() {
		t.Fatal("an expired certificate is valid")
	}
	for len(f.renewed) > 0 {
		<-f.renewed
	}
	must(t, again.Ensure(t.Context()))
	if len(f.renewed) != 1 || len(f.enrolled) != 3 || !again.Valid() {
		t.Errorf("after expiry: %d renewals, %d enrolments", len(f.renewed), len(f.enrolled))
	}
	after, err := os.ReadFile(filepath.Join(cfg.Dir, keyName))
	must(t, err)
	if string(key) != string(after) {
		t.Error("the key changed")
	}
	f.fail = errors.New("servers are away")
	empty := cfg
	empty.Dir = r.path("empty")
	lost, err := OpenHolder(empty)
	must(t, err)
	if err := lost.Ensure(t.Context()); err == nil || !strings.Contains(err.Error(), "servers are away") {
		t.Errorf("without servers: %v", err)
	}
	if c, err := lost.Material().Client(Only(RoleServer)).GetClientCertificate(nil); err != nil || len(c.Certificate) != 0 {
		t.Errorf("a client that has none shows %v, %v", c, err)
	}
}

// TestHolderRenewsWhenDue gets the first certificate while Run waits for one: it is not renewed before its time.
func TestHolderRenewsWhenDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegion(t, "global")
		f := &remote{r: r, life: time.Hour, enrolled: make(chan []byte, 10), renewed: make(chan []byte, 10)}
		h, err := OpenHolder(HolderConfig{Dir: r.path("identity"), CA: r.caFile, Identity: Identity{RoleNode, "global", "n1"}, Remote: f})
		must(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- h.Keep(ctx) }()
		time.Sleep(30 * time.Minute) // virtual
		if len(f.enrolled) != 1 || len(f.renewed) != 0 {
			t.Errorf("before it is due: %d enrolments, %d renewals", len(f.enrolled), len(f.renewed))
		}
		time.Sleep(16 * time.Minute)
		if len(f.enrolled) != 1 || len(f.renewed) != 1 {
			t.Errorf("when it is due: %d enrolments, %d renewals", len(f.enrolled), len(f.renewed))
		}
		cancel()
		must(t, <-done)
	})
}

// TestClocksBehind looks at fresh certificates by clocks that are behind the issuer's.
func TestClocksBehind(t *testing.T) {
	now := time.Now()
	ca, err := NewCA("global", 24*time.Hour, now.Add(-skew/2))
	must(t, err)
	node, err := ca.NewNodeCA(24*time.Hour, now)
	must(t, err)
	key, err := NewKey()
	must(t, err)
	id := Identity{RoleNode, "global", "n1"}
	chain, err := node.Issue(id, Names{}, key.Public(), time.Hour, now)
	must(t, err)
	certs, err := ParseChain(chain)
	must(t, err)
	m := &Material{cfg: Config{Region: "global"}, log: slog.New(slog.DiscardHandler)}
	m.current.Store(&loaded{pool: pool([]*x509.Certificate{ca.Cert})})
	for behind, fine := range map[time.Duration]bool{0: true, skew - time.Minute: true, skew + time.Minute: false} {
		if _, err := m.Verify(certs, Only(RoleNode), x509.ExtKeyUsageClientAuth, now.Add(-behind)); (err == nil) != fine {
			t.Errorf("by a clock that is %s behind: %v", behind, err)
		}
	}
	early, err := node.Issue(id, Names{}, key.Public(), time.Hour, now.Add(-skew/2))
	must(t, err)
	if certs, err = ParseChain(early); err != nil || certs[0].NotBefore.Before(node.Cert.NotBefore) {
		t.Errorf("a certificate begins before its CA: %v, %v, %v", certs[0].NotBefore, node.Cert.NotBefore, err)
	}
	if life := Life(certs[0]); life > time.Hour {
		t.Errorf("it lives %s", life)
	}
}

func TestIssuer(t *testing.T) {
	r, other := newRegion(t, "global"), newRegion(t, "global")
	server := r.material(RoleServer, "s1")
	i, err := NewIssuer(IssuerConfig{Cert: r.nodeCA, Key: r.nKey, Material: server, Grace: time.Minute})
	must(t, err)
	k, err := NewKey()
	must(t, err)
	id := Identity{RoleNode, "global", "n1"}
	chain, err := i.Issue(id, k.Public())
	must(t, err)
	certs, err := ParseChain(chain)
	must(t, err)
	if got, err := i.Renewable(certs); err != nil || got != id || !i.Enrolled(certs[0]) {
		t.Errorf("renewable as %v, %v; enrolled %v", got, err, i.Enrolled(certs[0]))
	}
	// Within the grace, and not beyond.
	for ago, want := range map[time.Duration]bool{30 * time.Second: true, 2 * time.Minute: false} {
		old, err := r.node.Issue(id, Names{}, k.Public(), -ago, time.Now())
		must(t, err)
		certs, err := ParseChain(old)
		must(t, err)
		if _, err := i.Renewable(certs); (err == nil) != want {
			t.Errorf("expired %s ago: %v", ago, err)
		}
	}
	for name, m := range map[string]*Material{"a server": server, "a worker": r.material(RoleWorker, "w1"), "a stranger": other.material(RoleNode, "n1")} {
		certs, err := ParseChain(m.Chain())
		must(t, err)
		if id, err := i.Renewable(certs); err == nil {
			t.Errorf("%s may renew as %s", name, id)
		}
	}
	if g := r.material(RoleGateway, "g1"); i.Enrolled(g.Leaf()) {
		t.Error("a gateway's certificate by the CA counts as enrolled")
	}
	for want, cfg := range map[string]IssuerConfig{
		"is not signed by the CA":   {Cert: other.nodeCA, Key: other.nKey, Material: server},
		"is the region's CA itself": {Cert: r.caFile, Key: r.path("ca-key.pem"), Material: server},
		"no such file":              {Cert: r.path("no.pem"), Key: r.nKey, Material: server},
	} {
		if text, err := r.ca.KeyPEM(); err == nil && !exists(r.path("ca-key.pem")) {
			must(t, Create(r.path("ca-key.pem"), text, ModeKey))
		}
		if _, err := NewIssuer(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
