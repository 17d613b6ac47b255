package pki

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// How long certificates live that servers sign. Gateways and workers must outlive servers that are away: they are renewed at
// a third of their life, which leaves two days.
const (
	DefaultNodeLife    = 24 * time.Hour
	DefaultGatewayLife = 72 * time.Hour
	DefaultWorkerLife  = 72 * time.Hour
	// DefaultGrace is how long after its end a node's certificate can still be renewed: a node that was off for a weekend
	// comes back by itself.
	DefaultGrace = 7 * 24 * time.Hour
	// RenewServingAt is the share of its life after which the certificate of a gateway or worker is renewed.
	RenewServingAt = 1. / 3
)

// IssuerConfig says what an Issuer signs with. A duration of 0 means its default.
type IssuerConfig struct {
	Cert, Key string    // PEM files of the node CA
	Material  *Material // the server's own: its CA must have signed the node CA

	NodeLife, GatewayLife, WorkerLife, Grace time.Duration

	Logger *slog.Logger
}

// Issuer signs what lives shortly, with a node CA that it reads again when its files change. It is safe for concurrent use.
type Issuer struct {
	cfg     IssuerConfig
	current atomic.Pointer[Authority]
	mu      sync.Mutex
	seen    []stamp
}

// NewIssuer reads the node CA and reports every fault.
func NewIssuer(cfg IssuerConfig) (*Issuer, error) {
	cfg.NodeLife = cmp.Or(cfg.NodeLife, DefaultNodeLife)
	cfg.GatewayLife = cmp.Or(cfg.GatewayLife, DefaultGatewayLife)
	cfg.WorkerLife = cmp.Or(cfg.WorkerLife, DefaultWorkerLife)
	cfg.Grace = cmp.Or(cfg.Grace, DefaultGrace)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	i := &Issuer{cfg: cfg}
	if err := i.Reload(); err != nil {
		return nil, err
	}
	return i, nil
}

// Reload reads the node CA again; when it is at fault the old one stays in use.
func (i *Issuer) Reload() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.seen = stamps([]string{i.cfg.Cert, i.cfg.Key})
	a, err := LoadAuthority(i.cfg.Cert, i.cfg.Key)
	if err != nil {
		return fmt.Errorf("node CA: %w", err)
	}
	if !a.Node {
		return fmt.Errorf("node CA: %s is the region's CA itself, whose key should be on no server: use node-ca.pem", i.cfg.Cert)
	}
	if want := i.cfg.Material.region(); a.Region != want {
		return fmt.Errorf("node CA: %s is for region %s; this is region %s", i.cfg.Cert, a.Region, want)
	}
	if _, err := a.Cert.Verify(x509.VerifyOptions{
		Roots: i.cfg.Material.current.Load().pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}); err != nil {
		return fmt.Errorf("node CA: %s is not signed by the CA in %s: %w", i.cfg.Cert, i.cfg.Material.cfg.CA, err)
	}
	i.current.Store(a)
	return nil
}

// Run reads the node CA again when its files have changed, until ctx ends.
func (i *Issuer) Run(ctx context.Context) error {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		i.mu.Lock()
		changed := !slices.Equal(i.seen, stamps([]string{i.cfg.Cert, i.cfg.Key}))
		i.mu.Unlock()
		if !changed {
			continue
		}
		if err := i.Reload(); err != nil {
			i.cfg.Logger.Error("the node CA's files have changed and cannot be used; going on with the old ones", "error", err)
		}
	}
}

// Region is the one that certificates are signed for.
func (i *Issuer) Region() string { return i.current.Load().Region }

// Issue signs a certificate for a node, worker or gateway, for its role's life.
func (i *Issuer) Issue(id Identity, pub crypto.PublicKey) (chain [][]byte, err error) {
	life := i.cfg.NodeLife
	switch id.Role {
	case RoleGateway:
		life = i.cfg.GatewayLife
	case RoleWorker:
		life = i.cfg.WorkerLife
	}
	return i.current.Load().Issue(id, Names{}, pub, life, time.Now())
}

// Renewable says who a chain names that this region's CA vouches for, or did until lately, and whose renewal may be asked for.
func (i *Issuer) Renewable(chain []*x509.Certificate) (Identity, error) {
	peers := Only(RoleNode, RoleGateway)
	peers.Grace = map[Role]time.Duration{RoleNode: i.cfg.Grace, RoleGateway: i.cfg.Grace}
	return i.cfg.Material.Verify(chain, peers, x509.ExtKeyUsageClientAuth, time.Now())
}

// Enrolled says whether a certificate was signed by a node CA, by enrolment, and not by the region's CA.
func (i *Issuer) Enrolled(cert *x509.Certificate) bool {
	return !slices.ContainsFunc(i.cfg.Material.current.Load().cas, func(ca *x509.Certificate) bool { return cert.CheckSignatureFrom(ca) == nil })
}
