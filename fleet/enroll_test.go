package fleet

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/pki"
)

// secure is a running Server behind mTLS, with the CA of its region.
type secure struct {
	*fleet
	ca, nodeCA *pki.Authority
	material   *pki.Material // the server's
	addr       string
	tokens     int
}

// startSecure lets everybody with a certificate, and clients without, reach the handlers.
func startSecure(t *testing.T, peers pki.Peers) *secure {
	t.Helper()
	dir, now := t.TempDir(), time.Now()
	ca, err := pki.NewCA("global", 10*time.Hour, now.Add(-5*time.Hour)) // so that it can have signed what has expired
	ok(t, err)
	nodeCA, err := ca.NewNodeCA(10*time.Hour, now.Add(-5*time.Hour))
	ok(t, err)
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		ok(t, pki.Create(path, content, pki.ModeKey))
		return path
	}
	text, err := nodeCA.KeyPEM()
	ok(t, err)
	key, err := pki.NewKey()
	ok(t, err)
	own, err := pki.EncodeKey(key)
	ok(t, err)
	chain, err := ca.Issue(pki.Identity{Role: pki.RoleServer, Region: "global", Name: "s1"}, pki.ServerNames("global", nil, nil), key.Public(), time.Hour, now)
	ok(t, err)
	caFile := file("ca.pem", ca.CertPEM())
	material, err := pki.Load(pki.Config{CA: caFile, Cert: file("s1.pem", pki.EncodeChain(chain)), Key: file("s1-key.pem", own), Region: "global", Role: pki.RoleServer})
	ok(t, err)
	issuer, err := pki.NewIssuer(pki.IssuerConfig{Cert: file("node-ca.pem", nodeCA.CertPEM()), Key: file("node-ca-key.pem", text), Material: material, Grace: time.Hour})
	ok(t, err)

	store := &memStore{state: cluster.NewState()}
	s := &secure{ca: ca, nodeCA: nodeCA, material: material, fleet: &fleet{T: t, store: store, Server: NewServer(Config{
		Name: "s1", Store: store, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), TTL: time.Hour,
		RequireIdentity: true, Issuer: issuer, Blobs: bytesOf{"d": []byte("model")},
	})}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	s.addr = l.Addr().String()
	rpc := grpc.NewServer(grpc.WaitForHandlers(true), grpc.Creds(credentials.NewTLS(material.Server(peers))))
	pb.RegisterFleetServer(rpc, s.Server)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := rpc.Serve(l); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		if err := s.Server.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		rpc.Stop()
		cancel()
		wg.Wait()
		if err := store.State().Snapshot().Check(); err != nil {
			t.Error(err)
		}
	})
	return s
}

var everybody = pki.Peers{Roles: pki.Roles, Anonymous: true}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// client is a client with a certificate, or without when chain is nil.
func (s *secure) as(chain [][]byte, key *ecdsa.PrivateKey) *grpc.ClientConn {
	s.Helper()
	cfg := s.material.Anonymous(pki.Only(pki.RoleServer))
	if chain != nil {
		cfg.Certificates = []tls.Certificate{{Certificate: chain, PrivateKey: key}}
	}
	conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	ok(s.T, err)
	s.Cleanup(func() { conn.Close() })
	return conn
}

func newKey(t *testing.T) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := pki.NewKey()
	ok(t, err)
	csr, err := pki.NewCSR(key)
	ok(t, err)
	return key, csr
}

// signed is a client with a certificate that no enrolment stands behind.
func (s *secure) signed(by *pki.Authority, role pki.Role, name string) *grpc.ClientConn {
	s.Helper()
	key, _ := newKey(s.T)
	chain, err := by.Issue(pki.Identity{Role: role, Region: "global", Name: name}, pki.Names{}, key.Public(), time.Hour, time.Now())
	ok(s.T, err)
	return s.as(chain, key)
}

// token makes an introduction token and gives its secret.
func (s *secure) token(change func(*cluster.IntroToken)) string {
	s.Helper()
	s.tokens++
	secret := rand.Text()
	k := &cluster.IntroToken{
		ID: fmt.Sprintf("%08x-0000-4000-8000-000000000000", s.tokens), SecretHash: IntroHash(secret), Role: cluster.RoleNode, Uses: 1, ExpiresTime: 1e9,
	}
	if change != nil {
		change(k)
	}
	s.must(&cluster.CreateIntroToken{Token: k})
	return secret
}

func enrolment(token, role, name string, csr []byte) *pb.EnrollRequest {
	return &pb.EnrollRequest{Token: token, Csr: csr, Role: role, Name: name, NodeName: "n-" + name}
}

// enrol enrols and gives a client with the certificate.
func (s *secure) enrol(role, name string) (*grpc.ClientConn, [][]byte, *ecdsa.PrivateKey) {
	s.Helper()
	key, csr := newKey(s.T)
	token := s.token(func(k *cluster.IntroToken) { k.Role = role })
	c, err := pb.NewFleetClient(s.as(nil, nil)).Enroll(s.Context(), enrolment(token, role, name, csr))
	ok(s.T, err)
	return s.as(c.Chain, key), c.Chain, key
}

// attachBy opens a session over a connection and gives the stream and how it began.
func (s *secure) attachBy(conn *grpc.ClientConn, id string) (*node, error) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), patience)
	s.Cleanup(cancel)
	stream, err := pb.NewFleetClient(conn).Attach(ctx)
	ok(s.T, err)
	n := &node{s.fleet, id, stream, cancel}
	_ = stream.Send(&pb.NodeMessage{Message: &pb.NodeMessage_Hello{Hello: &pb.Hello{Protocol: 1, Node: cluster.Marshal(record(id)), Session: rand.Text()}}})
	for {
		m, err := stream.Recv()
		if err != nil {
			return n, err
		}
		if m.GetDesired() != nil {
			return n, nil
		}
	}
}

// TestCallersNameEveryCall compares the table with the protocol.
func TestCallersNameEveryCall(t *testing.T) {
	named := map[string]bool{}
	for _, m := range pb.Fleet_ServiceDesc.Methods {
		named[m.MethodName] = true
	}
	for _, m := range pb.Fleet_ServiceDesc.Streams {
		named[m.StreamName] = true
	}
	for name := range named {
		if _, ok := callers[name]; !ok {
			t.Errorf("nobody says who may call %s", name)
		}
	}
	for name := range callers {
		if !named[name] {
			t.Errorf("%s is no call", name)
		}
	}
	peers := PeersOf()
	slices.Sort(peers.Roles)
	if !peers.Anonymous || !slices.Equal(peers.Roles, []pki.Role{pki.RoleGateway, pki.RoleNode}) {
		t.Errorf("the listener is open for %+v", peers)
	}
}

// TestEveryCallAsksWhoCalls makes every call in every role.
func TestEveryCallAsksWhoCalls(t *testing.T) {
	s := startSecure(t, everybody)
	node, _, _ := s.enrol(cluster.RoleNode, nodeA)
	gateway, _, _ := s.enrol(cluster.RoleGateway, "g1")
	clients := map[string]*grpc.ClientConn{
		"node": node, "gateway": gateway, "nobody": s.as(nil, nil), "server": s.signed(s.ca, pki.RoleServer, "s2"),
		"operator": s.signed(s.ca, pki.RoleOperator, "me"), "worker": s.signed(s.nodeCA, pki.RoleWorker, "alloc"),
		"node that is not enrolled": s.signed(s.nodeCA, pki.RoleNode, nodeB), "node by the CA": s.signed(s.ca, pki.RoleNode, nodeB),
		"gateway that is not enrolled": s.signed(s.nodeCA, pki.RoleGateway, "g2"), "gateway by the CA": s.signed(s.ca, pki.RoleGateway, "g3"),
		"node with another's key": s.signed(s.nodeCA, pki.RoleNode, nodeA),
	}
	for method, roles := range callers {
		if roles == nil {
			continue
		}
		for who, conn := range clients {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/"+pb.Fleet_ServiceDesc.ServiceName+"/"+method)
			if err == nil {
				_ = stream.SendMsg(&pb.Heartbeat{}) // empty: the handler looks at the caller first
				_ = stream.CloseSend()
				err = stream.RecvMsg(&pb.Heartbeat{})
			}
			cancel()
			code := status.Code(err)
			if errors.Is(err, io.EOF) {
				code = codes.OK
			}
			refused := code == codes.PermissionDenied || code == codes.Unauthenticated ||
				code == codes.Unavailable && who == "worker" // whose certificate is not for clients
			may := who == string(roles[0]) || roles[0] == pki.RoleGateway && who == "gateway by the CA"
			if method == "SignWorker" && who == "node" { // it was asked for an allocation that is not there, with no request
				may = false
				refused = code == codes.InvalidArgument
			}
			if may == refused {
				t.Errorf("%s by %s: %v", method, who, err)
			}
		}
	}
}

func TestListenerTurnsOthersAway(t *testing.T) {
	s := startSecure(t, PeersOf())
	for _, conn := range []*grpc.ClientConn{s.signed(s.ca, pki.RoleServer, "s2"), s.signed(s.ca, pki.RoleOperator, "me"), s.signed(s.nodeCA, pki.RoleWorker, "alloc")} {
		_, csr := newKey(t)
		if _, err := pb.NewFleetClient(conn).Enroll(t.Context(), enrolment("x", "node", nodeA, csr)); status.Code(err) != codes.Unavailable {
			t.Errorf("a wrong role reaches a handler: %v", err)
		}
	}
	conn, _, _ := s.enrol(cluster.RoleNode, nodeA)
	if _, err := s.attachBy(conn, nodeA); err != nil {
		t.Errorf("a node: %v", err)
	}
}

func TestNodeSpeaksForItselfOnly(t *testing.T) {
	s := startSecure(t, everybody)
	conn, _, _ := s.enrol(cluster.RoleNode, nodeA)
	other, _, _ := s.enrol(cluster.RoleNode, nodeB)
	n, err := s.attachBy(conn, nodeA)
	ok(t, err)
	_, err = s.attachBy(other, nodeB)
	ok(t, err)
	if _, err := s.attachBy(other, nodeA); status.Code(err) != codes.PermissionDenied {
		t.Errorf("hello of another node: %v", err)
	}
	// Nor answers for it.
	done := make(chan error, 1)
	go func() {
		b, err := s.one(t.Context(), nodeA, &pb.Call{Request: &pb.Call_NodeStats{NodeStats: &pb.NodeStatsRequest{}}})
		if err == nil && string(b) != "mine" {
			err = fmt.Errorf("answered by another: %s", b)
		}
		done <- err
	}()
	call := n.next().GetCall()
	if call == nil {
		t.Fatal("no call came")
	}
	answer := func(conn *grpc.ClientConn, text string) error {
		stream, err := pb.NewFleetClient(conn).Answer(t.Context())
		ok(t, err)
		_ = stream.Send(&pb.AnswerChunk{CallId: call.Id, Data: []byte(text)})
		_ = stream.CloseSend()
		_, err = stream.Recv()
		return err
	}
	if err := answer(other, "theirs"); status.Code(err) != codes.NotFound {
		t.Errorf("an answer in another's name: %v", err)
	}
	if err := answer(conn, "mine"); err != nil && !errors.Is(err, io.EOF) && status.Code(err) != codes.Canceled {
		t.Errorf("its own answer: %v", err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	// A worker's certificate only for an allocation of its own.
	alloc := s.place("web", nodeA, nil)
	_, csr := newKey(t)
	for who, c := range map[string]*grpc.ClientConn{"": conn, "another node": other} {
		cert, err := pb.NewFleetClient(c).SignWorker(t.Context(), &pb.SignWorkerRequest{Csr: csr, AllocId: alloc})
		if who != "" {
			if status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s gets a worker's certificate: %v", who, err)
			}
			continue
		}
		ok(t, err)
		certs, err := pki.ParseChain(cert.Chain)
		ok(t, err)
		if id, err := pki.IdentityOf(certs[0]); err != nil || (id != pki.Identity{Role: pki.RoleWorker, Region: "global", Name: alloc}) {
			t.Errorf("worker's identity: %v, %v", id, err)
		}
	}
	if _, err := pb.NewFleetClient(conn).SignWorker(t.Context(), &pb.SignWorkerRequest{Csr: csr, AllocId: "none"}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("an allocation that is not there: %v", err)
	}
	s.must(&cluster.UpdateAllocs{Allocs: []*cluster.Allocation{{ID: alloc, ClientStatus: cluster.AllocClientFailed}}})
	if _, err := pb.NewFleetClient(conn).SignWorker(t.Context(), &pb.SignWorkerRequest{Csr: csr, AllocId: alloc}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("an allocation that has ended: %v", err)
	}
}

// TestTokenIsUsedOnce has many ask at once with one single-use token.
func TestTokenIsUsedOnce(t *testing.T) {
	s := startSecure(t, everybody)
	token, client := s.token(nil), pb.NewFleetClient(s.as(nil, nil))
	const many = 32
	type result struct {
		name string
		csr  []byte
		err  error
	}
	results := make(chan result, many)
	var wg sync.WaitGroup
	for i := range many {
		_, csr := newKey(t)
		wg.Go(func() {
			name := fmt.Sprintf("node-%d", i)
			_, err := client.Enroll(t.Context(), enrolment(token, "node", name, csr))
			results <- result{name, csr, err}
		})
	}
	wg.Wait()
	close(results)
	var winner result
	won := 0
	for r := range results {
		switch {
		case r.err == nil:
			winner, won = r, won+1
		case status.Code(r.err) != codes.PermissionDenied || !strings.Contains(r.err.Error(), "used up"):
			t.Errorf("refused with %v", r.err)
		}
	}
	if won != 1 {
		t.Fatalf("%d enrolled with one single-use token", won)
	}
	if _, err := client.Enroll(t.Context(), enrolment(token, "node", winner.name, winner.csr)); err != nil {
		t.Errorf("the same again: %v", err)
	}
	_, csr := newKey(t)
	for text, req := range map[string]*pb.EnrollRequest{
		"enrolled with another key": enrolment(s.token(nil), "node", winner.name, csr),
		"is not known":              enrolment("guess", "node", "x", csr),
		"needs an introduction":     enrolment("", "node", "x", csr),
		"for role node, not":        enrolment(s.token(nil), "gateway", "x", csr),
		"use one of":                enrolment(s.token(nil), "root", "x", csr),
		"cannot be in a":            enrolment(s.token(nil), "server", "x", csr),
		`name "../x"`:               enrolment(s.token(nil), "node", "../x", csr),
		"certificate request":       enrolment(s.token(nil), "node", "x", []byte("junk")),
		`is for node "y"`:           enrolment(s.token(func(k *cluster.IntroToken) { k.NodeName = "y" }), "node", "x", csr),
		"has expired": func() *pb.EnrollRequest {
			token := s.token(func(k *cluster.IntroToken) { k.ExpiresTime = int64(s.store.index) + 2 })
			s.must(&cluster.SetSchedulerConfig{Config: &cluster.SchedulerConfiguration{}}) // time goes on with the log
			return enrolment(token, "node", "x", csr)
		}(),
	} {
		before := s.store.index
		_, err := client.Enroll(t.Context(), req)
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", text, err)
		}
		if text == "is not known" && s.store.index != before {
			t.Error("a wrong token makes a log entry")
		}
	}
}

func TestRenewal(t *testing.T) {
	s := startSecure(t, everybody)
	conn, chain, key := s.enrol(cluster.RoleNode, nodeA)
	csr, err := pki.NewCSR(key)
	ok(t, err)
	next, err := pb.NewFleetClient(conn).Renew(t.Context(), &pb.RenewRequest{Csr: csr})
	ok(t, err)
	if slices.Equal(next.Chain[0], chain[0]) {
		t.Error("the same certificate came back")
	}
	anonymous := pb.NewFleetClient(s.as(nil, nil))
	id := pki.Identity{Role: pki.RoleNode, Region: "global", Name: nodeA}
	late := func(ago time.Duration, by *pki.Authority, id pki.Identity) [][]byte {
		c, err := by.Issue(id, pki.Names{}, key.Public(), time.Hour, time.Now().Add(-ago-time.Hour))
		ok(t, err)
		return c
	}
	_, err = anonymous.Renew(t.Context(), &pb.RenewRequest{Csr: csr, Expired: late(30*time.Minute, s.nodeCA, id)})
	ok(t, err)
	_, foreign := newKey(t)
	for what, c := range map[string]struct {
		req  *pb.RenewRequest
		code codes.Code
	}{
		"nothing":                   {&pb.RenewRequest{Csr: csr}, codes.Unauthenticated},
		"expired for too long":      {&pb.RenewRequest{Csr: csr, Expired: late(2*time.Hour, s.nodeCA, id)}, codes.PermissionDenied},
		"another's key":             {&pb.RenewRequest{Csr: foreign, Expired: chain}, codes.PermissionDenied},
		"no request":                {&pb.RenewRequest{Expired: chain}, codes.InvalidArgument},
		"by the CA, not enrolled":   {&pb.RenewRequest{Csr: csr, Expired: late(-time.Minute, s.ca, pki.Identity{Role: pki.RoleGateway, Region: "global", Name: "g"})}, codes.PermissionDenied},
		"not enrolled":              {&pb.RenewRequest{Csr: csr, Expired: late(-time.Minute, s.nodeCA, pki.Identity{Role: pki.RoleNode, Region: "global", Name: nodeB})}, codes.PermissionDenied},
		"a worker":                  {&pb.RenewRequest{Csr: csr, Expired: late(-time.Minute, s.nodeCA, pki.Identity{Role: pki.RoleWorker, Region: "global", Name: "w"})}, codes.PermissionDenied},
		"junk instead of its chain": {&pb.RenewRequest{Csr: csr, Expired: [][]byte{[]byte("junk")}}, codes.InvalidArgument},
	} {
		if _, err := anonymous.Renew(t.Context(), c.req); status.Code(err) != c.code {
			t.Errorf("%s: %v, want %v", what, err, c.code)
		}
	}
	// Once the node is purged nothing of it is worth anything: its session ends, and its certificate opens no other.
	n, err := s.attachBy(conn, nodeA)
	ok(t, err)
	s.must(&cluster.DeregisterNode{NodeID: nodeA})
	if err := n.end(); status.Code(err) != codes.Aborted {
		t.Errorf("the session of a purged node ended with %v", err)
	}
	if _, err := s.attachBy(conn, nodeA); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a purged node attaches: %v", err)
	}
	if _, err := pb.NewFleetClient(conn).Renew(t.Context(), &pb.RenewRequest{Csr: csr}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a purged node renews: %v", err)
	}
	if s.store.State().Snapshot().Node(nil, nodeA) != nil {
		t.Error("a purged node came back")
	}
	// It comes back by a new token, with its key.
	_, err = anonymous.Enroll(t.Context(), enrolment(s.token(nil), "node", nodeA, csr))
	ok(t, err)
	if _, err := s.attachBy(conn, nodeA); err != nil {
		t.Errorf("introduced again: %v", err)
	}
}

// TestNodeKeepsItsName holds a node to the name that its token gave it.
func TestNodeKeepsItsName(t *testing.T) {
	s := startSecure(t, everybody)
	key, csr := newKey(t)
	token := s.token(func(k *cluster.IntroToken) { k.NodeName = "host-1" })
	req := enrolment(token, "node", nodeA, csr)
	req.NodeName = "host-1"
	c, err := pb.NewFleetClient(s.as(nil, nil)).Enroll(t.Context(), req)
	ok(t, err)
	if _, err := s.attachBy(s.as(c.Chain, key), nodeA); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "introduced as") {
		t.Errorf("a node of another name: %v", err)
	}
}

func TestWithoutTLSNothingIsSigned(t *testing.T) {
	f := start(t, Config{})
	_, csr := newKey(t)
	_, err1 := f.client().Enroll(t.Context(), enrolment("x", "node", nodeA, csr))
	_, err2 := f.client().Renew(t.Context(), &pb.RenewRequest{Csr: csr})
	_, err3 := f.client().SignWorker(t.Context(), &pb.SignWorkerRequest{Csr: csr})
	for _, err := range []error{err1, err2, err3} {
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("without TLS: %v", err)
		}
	}
}

// TestHolderEnrolsAndRenews drives a node's Holder over the wire: enrolment, renewal, and coming back after its end.
func TestHolderEnrolsAndRenews(t *testing.T) {
	s := startSecure(t, PeersOf())
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	ok(t, pki.Create(caFile, s.ca.CertPEM(), pki.ModeCert))
	secret := s.token(nil)
	gone, err := net.Listen("tcp", "127.0.0.1:0") // a server that does not answer is passed over
	ok(t, err)
	gone.Close()
	tokens := 0
	remote := &Remote{
		Servers: []string{gone.Addr().String(), s.addr}, Role: pki.RoleNode, Name: nodeA, NodeName: "n-" + nodeA,
		Token: func() (string, error) { tokens++; return secret, nil },
	}
	open := func() *pki.Holder {
		h, err := pki.OpenHolder(pki.HolderConfig{Dir: filepath.Join(filepath.Dir(caFile), "id"), CA: caFile, Identity: pki.Identity{Role: pki.RoleNode, Region: "global", Name: nodeA}, Remote: remote})
		ok(t, err)
		return h
	}
	h := open()
	ok(t, h.Ensure(t.Context()))
	conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(credentials.NewTLS(h.Material().Client(pki.Only(pki.RoleServer)))))
	ok(t, err)
	defer conn.Close()
	n, err := s.attachBy(conn, nodeA)
	ok(t, err)
	again := open() // as after a restart
	ok(t, again.Ensure(t.Context()))
	if tokens != 1 {
		t.Errorf("the token was asked for %d times", tokens)
	}
	s.must(&cluster.DeregisterNode{NodeID: nodeA})
	_ = n.end()
	if err := again.Enroll(t.Context()); err == nil || !strings.Contains(err.Error(), "used up") {
		t.Errorf("a purged node with its old token: %v", err)
	}
	secret = s.token(nil)
	ok(t, again.Enroll(t.Context()))
	if _, err := s.attachBy(conn, nodeA); err != nil { // the connection is the old one, with the same key
		t.Errorf("after another introduction: %v", err)
	}
}
