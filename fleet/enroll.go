package fleet

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/pki"
)

// Issuer signs what lives shortly; pki.Issuer is one.
type Issuer interface {
	Region() string
	// Issue signs a certificate of an identity for a key.
	Issue(id pki.Identity, pub crypto.PublicKey) (chain [][]byte, err error)
	// Renewable says who a chain names whose certificate is valid or expired lately.
	Renewable(chain []*x509.Certificate) (pki.Identity, error)
	// Enrolled says whether a certificate came by Enroll or Renew, and not from an operator.
	Enrolled(cert *x509.Certificate) bool
}

const (
	// maxEnrolling bounds the enrolments under way: anybody may ask for one.
	maxEnrolling = 64
	// maxSecret bounds the secret of a token, in bytes.
	maxSecret = 256
)

// callers says which role makes each call. Those without a role take anybody, and
// look for themselves.
var callers = map[string][]pki.Role{
	"Attach":       {pki.RoleNode},
	"Answer":       {pki.RoleNode},
	"Artifact":     {pki.RoleNode},
	"SignWorker":   {pki.RoleNode},
	"Routes":       {pki.RoleGateway},
	"Report":       {pki.RoleGateway},
	"ResolveToken": {pki.RoleGateway},
	"Renew":        nil,
	"Enroll":       nil,
}

// PeersOf is who may open a connection to the listener that the Fleet service is
// on: its callers, and clients without a certificate, who can only enrol.
func PeersOf() pki.Peers {
	peers := pki.Peers{Anonymous: true}
	for _, roles := range callers {
		for _, r := range roles {
			if !slices.Contains(peers.Roles, r) {
				peers.Roles = append(peers.Roles, r)
			}
		}
	}
	return peers
}

// caller is who makes a call, the zero one where nobody is asked.
type caller struct {
	pki.Identity
	key string // SHA-256 of its public key
}

// speaksFor refuses whoever calls in the name of another node.
func (c caller) speaksFor(nodeID string) error {
	if c.key != "" && c.Name != nodeID {
		return status.Errorf(codes.PermissionDenied, "%s may not speak for node %s", c.Identity, nodeID)
	}
	return nil
}

// peerCerts gives the certificates of a call's connection, which pki has verified.
func peerCerts(ctx context.Context) []*x509.Certificate {
	if p, ok := grpcpeer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			return info.State.PeerCertificates
		}
	}
	return nil
}

// identify says who makes a call, when it is one of those who may.
func (s *Server) identify(ctx context.Context, method string) (caller, error) {
	if !s.cfg.RequireIdentity {
		return caller{}, nil
	}
	certs := peerCerts(ctx)
	if len(certs) == 0 {
		return caller{}, status.Error(codes.Unauthenticated, "this call needs a certificate; without one a client can only enrol")
	}
	id, err := pki.IdentityOf(certs[0])
	if err != nil {
		return caller{}, status.Error(codes.Unauthenticated, err.Error())
	}
	if !slices.Contains(callers[method], id.Role) {
		return caller{}, status.Errorf(codes.PermissionDenied, "%s may not call %s: it is for role %s", id, method, callers[method])
	}
	c := caller{id, pki.KeyHash(certs[0].PublicKey)}
	if id.Role == pki.RoleNode || s.cfg.Issuer == nil || s.cfg.Issuer.Enrolled(certs[0]) {
		if err := s.enrolled(ctx, c); err != nil {
			return caller{}, err
		}
	}
	return c, nil
}

// enrolled refuses a caller whose enrolment has ended, or is with another key.
func (s *Server) enrolled(ctx context.Context, c caller) error {
	is := func() bool {
		e := s.cfg.Store.State().Snapshot().Enrollment(nil, cluster.EnrollmentKey{Role: string(c.Role), Name: c.Name})
		return e != nil && e.KeyHash == c.key
	}
	if is() {
		return nil
	}
	if err := s.caught.wait(ctx); err != nil { // it may have enrolled at another server just now
		return toStatus(err)
	}
	if !is() {
		return status.Errorf(codes.PermissionDenied, "%s is not enrolled with this key: it was purged or replaced; enrol it with a new introduction token", c.Identity)
	}
	return nil
}

// Enroll implements pb.FleetServer. A wrong token makes no log entry.
func (s *Server) Enroll(ctx context.Context, req *pb.EnrollRequest) (*pb.Certificate, error) {
	if s.cfg.Issuer == nil {
		return nil, status.Error(codes.Unimplemented, "this server signs no certificates: it runs without TLS")
	}
	select {
	case s.enrolling <- struct{}{}:
		defer func() { <-s.enrolling }()
	default:
		return nil, status.Errorf(codes.Unavailable, "%d enrolments are under way; try again", maxEnrolling)
	}
	pub, err := pki.CSRKey(req.Csr)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	id := pki.Identity{Role: pki.Role(req.Role), Region: s.cfg.Issuer.Region(), Name: req.Name}
	if err := id.Check(); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if req.Token == "" || len(req.Token) > maxSecret {
		return nil, status.Error(codes.PermissionDenied, "enrolment needs an introduction token; make one with `rxvision node intro`")
	}
	use := &cluster.UseIntroToken{
		SecretHash: IntroHash(req.Token), Role: req.Role, Name: req.Name, NodeName: req.NodeName, KeyHash: pki.KeyHash(pub),
	}
	known := func() bool { return s.cfg.Store.State().Snapshot().IntroTokenBySecret(nil, use.SecretHash) != nil }
	if !known() {
		if err := s.caught.wait(ctx); err != nil { // it may have been made at another server just now
			return nil, toStatus(err)
		}
		if !known() {
			s.metrics.enrolments.WithLabelValues("refused").Inc()
			return nil, status.Error(codes.PermissionDenied, "the introduction token is not known: it was never made here, or was deleted, or expired long ago; make one with `rxvision node intro`")
		}
	}
	if _, err := s.cfg.Store.Apply(ctx, use); err != nil {
		s.metrics.enrolments.WithLabelValues("refused").Inc()
		s.log.Warn("an enrolment was refused", "identity", id.String(), "error", err)
		if cluster.CodeOf(err) == cluster.CodeConflict {
			return nil, status.Error(codes.FailedPrecondition, err.Error())
		}
		return nil, toStatus(err)
	}
	chain, err := s.cfg.Issuer.Issue(id, pub)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	s.metrics.enrolments.WithLabelValues("done").Inc()
	s.log.Info("enrolled", "identity", id.String(), "name", req.NodeName)
	return &pb.Certificate{Chain: chain}, nil
}

// IntroHash is what the state keeps of a token's secret.
func IntroHash(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// Renew implements pb.FleetServer.
func (s *Server) Renew(ctx context.Context, req *pb.RenewRequest) (*pb.Certificate, error) {
	if s.cfg.Issuer == nil {
		return nil, status.Error(codes.Unimplemented, "this server signs no certificates: it runs without TLS")
	}
	certs := peerCerts(ctx)
	if len(req.Expired) > 0 {
		var err error
		if certs, err = pki.ParseChain(req.Expired); err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
	}
	if len(certs) == 0 {
		return nil, status.Error(codes.Unauthenticated, "there is no certificate to renew")
	}
	id, err := s.cfg.Issuer.Renewable(certs)
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	if !s.cfg.Issuer.Enrolled(certs[0]) {
		return nil, status.Errorf(codes.PermissionDenied, "the certificate of %s is an operator's work and not renewed here: use `rxvision tls cert create`", id)
	}
	pub, err := pki.CSRKey(req.Csr)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	c := caller{id, pki.KeyHash(certs[0].PublicKey)}
	if pki.KeyHash(pub) != c.key { // whoever has seen a certificate must not get one
		return nil, status.Error(codes.PermissionDenied, "the request is not signed with the key of the certificate to renew")
	}
	if err := s.enrolled(ctx, c); err != nil {
		return nil, err
	}
	chain, err := s.cfg.Issuer.Issue(id, pub)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &pb.Certificate{Chain: chain}, nil
}

// SignWorker implements pb.FleetServer.
func (s *Server) SignWorker(ctx context.Context, req *pb.SignWorkerRequest) (*pb.Certificate, error) {
	if s.cfg.Issuer == nil || !s.cfg.RequireIdentity {
		return nil, status.Error(codes.Unimplemented, "this server signs no certificates: it runs without TLS")
	}
	c, err := s.identify(ctx, "SignWorker")
	if err != nil {
		return nil, err
	}
	pub, err := pki.CSRKey(req.Csr)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	alloc := s.cfg.Store.State().Snapshot().Alloc(nil, req.AllocId)
	if alloc == nil { // the node may know of it from another server
		if err := s.caught.wait(ctx); err != nil {
			return nil, toStatus(err)
		}
		alloc = s.cfg.Store.State().Snapshot().Alloc(nil, req.AllocId)
	}
	if alloc == nil || alloc.NodeID != c.Name || alloc.ClientTerminal() {
		return nil, status.Errorf(codes.PermissionDenied, "allocation %.40q is not live on node %s", req.AllocId, c.Name)
	}
	chain, err := s.cfg.Issuer.Issue(pki.Identity{Role: pki.RoleWorker, Region: s.cfg.Issuer.Region(), Name: alloc.ID}, pub)
	if err != nil {
		return nil, status.Error(codes.Internal, errors.Join(errors.New("sign a worker's certificate"), err).Error())
	}
	return &pb.Certificate{Chain: chain}, nil
}
