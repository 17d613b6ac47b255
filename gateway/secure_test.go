package gateway

import (
	"crypto/tls"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rxvision/rxvision/pki"
)

// authority issues certificates of a region for tests.
type authority struct {
	*testing.T
	ca, node *pki.Authority
	dir      string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	ca, err := pki.NewCA("global", time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	node, err := ca.NewNodeCA(time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t, ca, node, t.TempDir()}
	if err := pki.Create(filepath.Join(a.dir, "ca.pem"), ca.CertPEM(), pki.ModeCert); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) material(role pki.Role, name string) *pki.Material {
	a.Helper()
	cert, keyFile := filepath.Join(a.dir, name+".pem"), filepath.Join(a.dir, name+"-key.pem")
	key, err := pki.EnsureKey(keyFile)
	if err != nil {
		a.Fatal(err)
	}
	chain, err := a.node.Issue(pki.Identity{Role: role, Region: "global", Name: name}, pki.Names{}, key.Public(), time.Hour, time.Now())
	if err != nil {
		a.Fatal(err)
	}
	if err := pki.Replace(cert, pki.EncodeChain(chain), pki.ModeCert); err != nil {
		a.Fatal(err)
	}
	m, err := pki.Load(pki.Config{CA: filepath.Join(a.dir, "ca.pem"), Cert: cert, Key: keyFile, Region: "global", Role: role})
	if err != nil {
		a.Fatal(err)
	}
	return m
}

// secureWorker is a worker of an allocation that answers gateways only.
func (a *authority) secureWorker(addr string, m *pki.Material, answer http.HandlerFunc) (string, *http.Server) {
	a.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		a.Fatal(err)
	}
	srv := &http.Server{Handler: answer}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(tls.NewListener(l, m.Server(pki.Only(pki.RoleGateway)))) }()
	a.Cleanup(func() { srv.Close(); <-done })
	return l.Addr().String(), srv
}

// TestWorkersAreKnownByTheirCertificates sends requests to the worker of the route's allocation and to nobody who took its place.
func TestWorkersAreKnownByTheirCertificates(t *testing.T) {
	a, r := newAuthority(t), startRegion(t)
	own := a.material(pki.RoleGateway, "g1")
	var asked, impostor atomic.Int64
	count := func(n *atomic.Int64) http.HandlerFunc {
		return func(w http.ResponseWriter, req *http.Request) { n.Add(1); echo(w, req) }
	}
	// Both allocations of the route: one has moved away from its address, where another's worker listens now.
	good, server := a.secureWorker("127.0.0.1:0", a.material(pki.RoleWorker, "alloc-0"), count(&asked))
	bad, _ := a.secureWorker("127.0.0.1:0", a.material(pki.RoleWorker, "alloc-of-another-job"), count(&impostor))
	g, srv := startGateway(t, r, func(c *Config) {
		c.Hold = 100 * time.Millisecond
		c.WorkerTLS = func(alloc string) *tls.Config { return own.Client(pki.Exactly(pki.RoleWorker, alloc)) }
	})
	r.send(routesFor(nil, good, bad))
	until(t, g, ready(2))
	url := srv.URL + "/v2/models/m/infer"
	for range 20 {
		if status, body, _ := post(t, url, []byte(`{}`)); status != http.StatusOK {
			t.Fatalf("status %d: %s", status, body)
		}
	}
	if asked.Load() != 20 || impostor.Load() != 0 {
		t.Errorf("the worker was asked %d times, the one in another's place %d times", asked.Load(), impostor.Load())
	}
	// The worker ends, and another allocation's takes its very address: pooled connections do not lead there.
	server.Close()
	a.secureWorker(good, a.material(pki.RoleWorker, "alloc-2"), count(&impostor))
	if status, _, _ := post(t, url, []byte(`{}`)); status != http.StatusServiceUnavailable || impostor.Load() != 0 {
		t.Errorf("status %d; the new owner of the address was asked %d times", status, impostor.Load())
	}
}

// TestWorkerThatRefusesTheGatewayIsPassedOver has a worker that does not accept this gateway's certificate.
func TestWorkerThatRefusesTheGatewayIsPassedOver(t *testing.T) {
	a, stranger, r := newAuthority(t), newAuthority(t), startRegion(t)
	own := a.material(pki.RoleGateway, "g1")
	var asked atomic.Int64
	echoed := func(w http.ResponseWriter, req *http.Request) { asked.Add(1); echo(w, req) }
	good, _ := a.secureWorker("127.0.0.1:0", a.material(pki.RoleWorker, "alloc-0"), echoed)
	// It shows a certificate of this region, and trusts another CA.
	shown, trusting := a.material(pki.RoleWorker, "alloc-1"), stranger.material(pki.RoleWorker, "x").Server(pki.Only(pki.RoleGateway))
	trusting.GetCertificate = shown.Server(pki.Peers{}).GetCertificate
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refusing, done := &http.Server{Handler: http.HandlerFunc(echoed)}, make(chan struct{})
	go func() { defer close(done); _ = refusing.Serve(tls.NewListener(l, trusting)) }()
	t.Cleanup(func() { refusing.Close(); <-done })
	g, srv := startGateway(t, r, func(c *Config) {
		c.WorkerTLS = func(alloc string) *tls.Config { return own.Client(pki.Exactly(pki.RoleWorker, alloc)) }
	})
	r.send(routesFor(nil, good, l.Addr().String()))
	until(t, g, ready(2))
	for range 10 {
		if status, body, _ := post(t, srv.URL+"/v2/models/m/infer", []byte(`{}`)); status != http.StatusOK {
			t.Fatalf("status %d: %s", status, body)
		}
	}
	if asked.Load() != 10 {
		t.Errorf("asked %d times", asked.Load())
	}
}
