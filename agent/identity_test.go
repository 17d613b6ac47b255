package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/pki"
)

// serveTLS is what a worker does with its certificate, with looks at its files that
// need no patience.
func serveTLS(args []string, handler http.Handler) error {
	m, err := pki.Load(pki.Config{CA: flagValue(args, "-tls-ca"), Cert: flagValue(args, "-tls-cert"), Key: flagValue(args, "-tls-key"), Role: pki.RoleWorker})
	if err != nil {
		return err
	}
	go func() {
		for range time.Tick(20 * time.Millisecond) {
			_ = m.Reload()
		}
	}()
	peers := pki.Only(pki.RoleGateway, pki.RoleNode)
	peers.Is = func(id pki.Identity) error {
		if id.Role == pki.RoleNode && id.Name != flagValue(args, "-tls-node") {
			return errors.New("another node")
		}
		return nil
	}
	l, err := tls.Listen("tcp", flagValue(args, "-listen"), m.Server(peers))
	if err != nil {
		return err
	}
	return http.Serve(l, handler)
}

// secureFleet is a fleetServer behind mTLS that signs certificates for those who
// know the token.
type secureFleet struct {
	*fleetServer
	t          *testing.T
	ca, nodeCA *pki.Authority
	dir        string
	material   *pki.Material
	tokens     map[string]bool // unused ones; guarded by mu, like the rest
	purged     bool
	workerLife time.Duration
	signed     int
}

func newSecureFleet(t *testing.T) *secureFleet {
	t.Helper()
	f := newFleetServer(t)
	f.stop()
	s := &secureFleet{fleetServer: f, t: t, dir: t.TempDir(), tokens: map[string]bool{}, workerLife: time.Hour}
	now := time.Now()
	var err error
	s.ca, err = pki.NewCA("global", time.Hour, now)
	s.must(err)
	s.nodeCA, err = s.ca.NewNodeCA(time.Hour, now)
	s.must(err)
	s.must(pki.Create(s.path("ca.pem"), s.ca.CertPEM(), pki.ModeCert))
	s.material = s.issue(s.ca, pki.RoleServer, "s1")
	s.serve("127.0.0.1:0")
	return s
}

func (s *secureFleet) path(name string) string { return filepath.Join(s.dir, name) }

func (s *secureFleet) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// issue gives the material of somebody of the region.
func (s *secureFleet) issue(by *pki.Authority, role pki.Role, name string) *pki.Material {
	s.t.Helper()
	cert, keyFile := s.path(string(role)+name+".pem"), s.path(string(role)+name+"-key.pem")
	key, err := pki.EnsureKey(keyFile)
	s.must(err)
	chain, err := by.Issue(pki.Identity{Role: role, Region: "global", Name: name}, pki.Names{}, key.Public(), time.Hour, time.Now())
	s.must(err)
	s.must(pki.Replace(cert, pki.EncodeChain(chain), pki.ModeCert))
	m, err := pki.Load(pki.Config{CA: s.path("ca.pem"), Cert: cert, Key: keyFile, Region: "global", Role: role})
	s.must(err)
	return m
}

// serve listens with mTLS; stop and serve again are a restart.
func (s *secureFleet) serve(address string) {
	s.t.Helper()
	l, err := net.Listen("tcp", address)
	s.must(err)
	s.address = l.Addr().String()
	peers := pki.Only(pki.RoleNode)
	peers.Anonymous = true
	s.grpc = grpc.NewServer(grpc.Creds(credentials.NewTLS(s.material.Server(peers))))
	pb.RegisterFleetServer(s.grpc, s)
	server := s.grpc
	go func() { _ = server.Serve(l) }()
}

// who names the caller.
func who(ctx context.Context) (pki.Identity, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return pki.Identity{}, errors.New("no peer")
	}
	return pki.PeerIdentity(p.AuthInfo.(credentials.TLSInfo).State)
}

func (s *secureFleet) Attach(stream pb.Fleet_AttachServer) error {
	id, err := who(stream.Context())
	s.mu.Lock()
	purged := s.purged
	s.mu.Unlock()
	if err != nil || id.Role != pki.RoleNode || purged {
		return status.Errorf(codes.PermissionDenied, "%v is not enrolled (%v)", id, err)
	}
	return s.fleetServer.Attach(stream)
}

func (s *secureFleet) sign(csr []byte, role pki.Role, name string, life time.Duration) (*pb.Certificate, error) {
	pub, err := pki.CSRKey(csr)
	if err != nil {
		return nil, err
	}
	chain, err := s.nodeCA.Issue(pki.Identity{Role: role, Region: "global", Name: name}, pki.Names{}, pub, life, time.Now())
	return &pb.Certificate{Chain: chain}, err
}

func (s *secureFleet) Enroll(_ context.Context, r *pb.EnrollRequest) (*pb.Certificate, error) {
	var unused bool
	s.change(func() {
		unused = s.tokens[r.Token]
		delete(s.tokens, r.Token)
		s.purged = s.purged && !unused
	})
	if !unused {
		return nil, status.Error(codes.PermissionDenied, "the token is not known")
	}
	return s.sign(r.Csr, pki.Role(r.Role), r.Name, time.Hour)
}

func (s *secureFleet) SignWorker(ctx context.Context, r *pb.SignWorkerRequest) (*pb.Certificate, error) {
	if id, err := who(ctx); err != nil || id.Role != pki.RoleNode {
		return nil, status.Errorf(codes.PermissionDenied, "%v may not", id)
	}
	var life time.Duration
	s.change(func() { s.signed++; life = s.workerLife })
	return s.sign(r.Csr, pki.RoleWorker, r.AllocId, life)
}

// remote enrols as the program's own would, with the token that there is.
type remote struct {
	s     *secureFleet
	id    string
	token *atomic.Value
}

func (r remote) Enroll(ctx context.Context, wire *tls.Config, csr []byte) ([][]byte, error) {
	conn, err := grpc.NewClient(r.s.address, grpc.WithTransportCredentials(credentials.NewTLS(wire)))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	c, err := pb.NewFleetClient(conn).Enroll(ctx, &pb.EnrollRequest{Token: r.token.Load().(string), Csr: csr, Role: "node", Name: r.id})
	return c.GetChain(), err
}

func (r remote) Renew(context.Context, *tls.Config, []byte, [][]byte) ([][]byte, error) {
	return nil, errors.New("not in this test")
}

func (s *secureFleet) config(token *atomic.Value) Config {
	s.t.Helper()
	cfg := testConfig(s.t, s.fleetServer)
	cfg.Identity = func(nodeID, _ string) (*pki.Holder, error) {
		return pki.OpenHolder(pki.HolderConfig{
			Dir: filepath.Join(cfg.DataDir, "identity"), CA: s.path("ca.pem"), Identity: pki.Identity{Role: pki.RoleNode, Region: "global", Name: nodeID},
			Remote: remote{s, nodeID, token}, Use: "wire",
		})
	}
	return cfg
}

// call makes a request to a worker by a TLS configuration and gives the worker's certificate.
func call(address string, cfg *tls.Config) (*x509.Certificate, error) {
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: cfg}}
	scheme := "https"
	if cfg == nil {
		scheme = "http"
	}
	resp, err := client.Get(scheme + "://" + address + "/model")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.TLS == nil {
		return nil, fmt.Errorf("status %s", resp.Status)
	}
	return resp.TLS.PeerCertificates[0], nil
}

// TestIdentity takes a node from its token to a worker that gateways reach, through
// renewals, a restart without servers, and a purge.
func TestIdentity(t *testing.T) {
	s := newSecureFleet(t)
	s.workerLife = 3 * time.Second
	var token atomic.Value
	token.Store("wrong")
	cfg := s.config(&token)
	a := startAgent(t, cfg)
	waitFor(t, "a refused enrolment", func() bool { return a.log.count("the token is not known") > 0 })
	if s.node != nil {
		t.Fatal("a node without a certificate attached")
	}
	s.change(func() { s.tokens["right"] = true; token.Store("right") })
	s.wait(t, "the node", func() bool { return s.node != nil })

	j, alloc := service(t, onnxTask("m", s.model("a model")))
	s.run(j, alloc)
	ready := func() bool {
		got := s.reported[allocID]
		return got != nil && got.Serving != nil && got.Serving.Ready
	}
	s.wait(t, "a ready model", ready)
	gateway := s.issue(s.ca, pki.RoleGateway, "g1")
	expect := pki.Exactly(pki.RoleWorker, allocID)
	first, err := call(address(alloc), gateway.Client(expect))
	if err != nil {
		t.Fatal(err)
	}
	for name, wrong := range map[string]*tls.Config{
		"plain text":                  nil,
		"nobody":                      gateway.Anonymous(expect),
		"another node":                s.issue(s.nodeCA, pki.RoleNode, "n2").Client(expect),
		"a server":                    s.material.Client(expect),
		"an operator":                 s.issue(s.ca, pki.RoleOperator, "me").Client(expect),
		"a gateway that means others": gateway.Client(pki.Exactly(pki.RoleWorker, "other")),
	} {
		if _, err := call(address(alloc), wrong); err == nil {
			t.Errorf("%s reaches the worker", name)
		}
	}
	secrets := task.AllocDir(filepath.Join(cfg.DataDir, "alloc", allocID)).Task("m").Secrets()
	for path, want := range map[string]os.FileMode{secrets: 0o700, filepath.Join(secrets, workerKey): 0o600, filepath.Join(secrets, workerCert): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, want %v (%v)", path, info.Mode().Perm(), want, err)
		}
	}
	// The certificate is renewed under the running worker.
	waitFor(t, "a renewed certificate", func() bool {
		next, err := call(address(alloc), gateway.Client(expect))
		if err != nil {
			t.Fatalf("while the certificate is renewed: %v", err)
		}
		return next.SerialNumber.Cmp(first.SerialNumber) != 0
	})
	s.change(func() { s.workerLife = time.Hour })
	waitFor(t, "a certificate for longer", func() bool {
		next, err := call(address(alloc), gateway.Client(expect))
		return err == nil && time.Until(next.NotAfter) > time.Minute
	})
	if st := s.alloc(allocID).TaskStates["m"]; st.Restarts != 0 {
		t.Errorf("the worker was restarted %d times", st.Restarts)
	}

	// Without servers: a new agent takes the worker over and probes it.
	s.stop()
	a.stop()
	token.Store("used")
	b := startAgent(t, cfg)
	waitFor(t, "the worker to be probed", func() bool {
		r := b.runner(allocID)
		if r == nil {
			return false
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		serving := r.local.Tasks["m"].Serving
		return serving != nil && serving.Ready
	})
	if _, err := call(address(alloc), gateway.Client(expect)); err != nil {
		t.Errorf("without servers: %v", err)
	}
	hellos := s.hellos
	s.serve(s.address)
	s.wait(t, "the node's return", func() bool { return s.hellos > hellos })

	// Purged, it comes back by another token only.
	s.change(func() { s.purged = true; s.tokens["again"] = true; token.Store("again") })
	s.stop()
	hellos = s.hellos
	s.serve(s.address)
	t.Cleanup(func() { s.grpc.Stop() })
	s.wait(t, "the introduction", func() bool { return !s.purged && len(s.tokens) == 0 })
	s.wait(t, "the node's return", func() bool { return s.hellos > hellos })
	halting(t, s.fleetServer, b)
}

func TestWorkerCertificates(t *testing.T) {
	s := newSecureFleet(t)
	t.Cleanup(func() { s.grpc.Stop() })
	s.tokens["t"] = true
	var token atomic.Value
	token.Store("t")
	a := startAgent(t, s.config(&token))
	s.wait(t, "the node", func() bool { return s.node != nil })
	w, dir := workerTLS{a.Agent}, t.TempDir()
	certify := func(alloc string) *x509.Certificate {
		t.Helper()
		args, err := w.Certify(t.Context(), alloc, dir)
		if err != nil {
			t.Fatal(err)
		}
		if got := flagValue(args, "-tls-node"); got != a.NodeID() {
			t.Errorf("the worker is told node %q", got)
		}
		certs, err := pki.ReadCerts(flagValue(args, "-tls-cert"))
		s.must(err)
		return certs[0]
	}
	signed := func() int { s.mu.Lock(); defer s.mu.Unlock(); return s.signed }
	first := certify("a1")
	if again := certify("a1"); again.SerialNumber.Cmp(first.SerialNumber) != 0 || signed() != 1 {
		t.Error("a fresh certificate was replaced")
	}
	if other := certify("a2"); other.SerialNumber.Cmp(first.SerialNumber) == 0 {
		t.Error("another allocation got the certificate of the first")
	}
	// A due one is used while servers are away, an expired one is not.
	s.change(func() { s.workerLife = 5 * time.Second }) // certificates know whole seconds only
	due := certify("a3")
	s.change(func() { s.workerLife = 0 })
	s.stop()
	waitFor(t, "the end of the stream", func() bool { return !a.isConnected() })
	waitFor(t, "the certificate to be due", func() bool { return pki.Due(due, renewShare("a3"), time.Now()) })
	if time.Now().Before(due.NotAfter) {
		if _, err := w.certify(t.Context(), "a3", dir, false); err != nil && time.Now().Before(due.NotAfter) {
			t.Errorf("a due certificate without servers: %v", err)
		}
	}
	waitFor(t, "the certificate's end", func() bool { return time.Now().After(due.NotAfter) })
	if _, err := w.certify(t.Context(), "a3", dir, false); err == nil || !strings.Contains(err.Error(), "no server is connected") {
		t.Errorf("an expired certificate without servers: %v", err)
	}
}
