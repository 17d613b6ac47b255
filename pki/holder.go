package pki

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Names of files in a Holder's folder.
const (
	certName = "cert.pem"
	keyName  = "key.pem"
)

// DefaultRenewAt is the share of a certificate's life after which it is renewed.
const DefaultRenewAt = 2. / 3

const (
	// renewJitter spreads renewals over this share of a life, so that a fleet that began together does not renew together.
	renewJitter = 1. / 12
	// Bounds of the pause after a renewal that failed: a hundredth of the life within these.
	minRetry = 200 * time.Millisecond
	maxRetry = 5 * time.Minute
	maxPause = 30 * time.Second // between attempts of Keep
)

// Remote is where a Holder gets its certificate: a server, over the wire.
type Remote interface {
	// Enroll gets the first certificate for the key of csr, by an introduction token. wire is for the connection.
	Enroll(ctx context.Context, wire *tls.Config, csr []byte) (chain [][]byte, err error)
	// Renew gets the next one. expired is nil while the own certificate still identifies the connection, else the chain that
	// has expired, which identifies the asker for some time yet.
	Renew(ctx context.Context, wire *tls.Config, csr []byte, expired [][]byte) (chain [][]byte, err error)
}

// HolderConfig says whose certificate a Holder keeps.
type HolderConfig struct {
	Dir      string // made with mode 0700; holds key.pem, which never changes, and cert.pem
	CA       string // PEM file of the region's CA
	Identity Identity
	Remote   Remote
	RenewAt  float64 // share of life; 0: DefaultRenewAt

	Use        string // label of metrics
	Logger     *slog.Logger
	Registerer prometheus.Registerer // may be nil
}

// Holder keeps a short-lived certificate that servers sign, and its key. It is safe for concurrent use.
type Holder struct {
	cfg      HolderConfig
	log      *slog.Logger
	key      crypto.Signer
	material *Material
	getting  sync.Mutex
}

// OpenHolder opens the folder. The key is made and stored before it is first shown to anybody, so that an enrolment that
// was cut short goes on with the same one.
func OpenHolder(cfg HolderConfig) (*Holder, error) {
	if err := cfg.Identity.Check(); err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	if cfg.RenewAt == 0 {
		cfg.RenewAt = DefaultRenewAt
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("folder of the certificate: %w", err)
	}
	h := &Holder{cfg: cfg, log: cfg.Logger}
	keyFile := filepath.Join(cfg.Dir, keyName)
	var err error
	if h.key, err = EnsureKey(keyFile); err != nil {
		return nil, fmt.Errorf("TLS: key: %w", err)
	}
	h.material, err = Load(Config{
		CA: cfg.CA, Cert: filepath.Join(cfg.Dir, certName), Key: keyFile, Region: cfg.Identity.Region, Role: cfg.Identity.Role,
		Name: cfg.Identity.Name, MayLack: true, Use: cfg.Use, Logger: cfg.Logger, Registerer: cfg.Registerer,
	})
	if err != nil {
		return nil, err
	}
	return h, nil
}

// Material makes the TLS configurations with the newest certificate.
func (h *Holder) Material() *Material { return h.material }

// Valid says whether there is a certificate that has not expired.
func (h *Holder) Valid() bool {
	leaf := h.material.Leaf()
	return leaf != nil && time.Now().Before(leaf.NotAfter)
}

// Ensure gets a certificate unless there is a valid one: by renewal if the last one expired lately, else by enrolment.
func (h *Holder) Ensure(ctx context.Context) error {
	h.getting.Lock()
	defer h.getting.Unlock()
	if h.Valid() {
		return nil
	}
	var lapsed error
	if expired := h.material.Chain(); expired != nil {
		if lapsed = h.get(ctx, func(csr []byte) ([][]byte, error) { return h.cfg.Remote.Renew(ctx, h.anonymous(), csr, expired) }); lapsed == nil {
			h.log.Info("an expired certificate was renewed", "identity", h.cfg.Identity.String())
			return nil
		}
		lapsed = fmt.Errorf("the certificate expired at %s and could not be renewed: %w", h.material.Leaf().NotAfter.UTC().Format(time.DateTime), lapsed)
	}
	if err := h.enroll(ctx); err != nil {
		return errors.Join(lapsed, err)
	}
	return nil
}

// Enroll gets a certificate by enrolment even if there is a valid one: for a holder whom the servers do not know any more.
func (h *Holder) Enroll(ctx context.Context) error {
	h.getting.Lock()
	defer h.getting.Unlock()
	return h.enroll(ctx)
}

// enroll needs getting to be held.
func (h *Holder) enroll(ctx context.Context) error {
	err := h.get(ctx, func(csr []byte) ([][]byte, error) { return h.cfg.Remote.Enroll(ctx, h.anonymous(), csr) })
	if err != nil {
		return fmt.Errorf("enrol as %s: %w", h.cfg.Identity, err)
	}
	h.log.Info("enrolled", "identity", h.cfg.Identity.String(), "expires", h.material.Leaf().NotAfter.UTC())
	return nil
}

// anonymous is for connections to servers that no certificate of one's own can identify.
func (h *Holder) anonymous() *tls.Config { return h.material.Anonymous(Only(RoleServer)) }

// get asks for a certificate and takes it into use once it is found to be the right one and stored.
func (h *Holder) get(ctx context.Context, ask func(csr []byte) ([][]byte, error)) error {
	csr, err := NewCSR(h.key)
	if err != nil {
		return err
	}
	chain, err := ask(csr)
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	certs, err := ParseChain(chain)
	if err != nil {
		return fmt.Errorf("the server's answer: %w", err)
	}
	if !sameKey(certs[0].PublicKey, h.key.Public()) {
		return errors.New("the server's answer: the certificate is for another key")
	}
	want := h.cfg.Identity
	if _, err := h.material.Verify(certs, Exactly(want.Role, want.Name), x509.ExtKeyUsageAny, time.Now()); err != nil {
		return fmt.Errorf("the server's answer: %w", err)
	}
	if err := Replace(filepath.Join(h.cfg.Dir, certName), EncodeChain(chain), ModeKey); err != nil {
		return fmt.Errorf("store the certificate: %w", err)
	}
	return h.material.Reload()
}

// Keep is Run for who does nothing else with the Holder: it also gets the first certificate.
func (h *Holder) Keep(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { _ = h.Run(ctx) }) // gives no errors
	for pause := time.Second; ; pause = min(2*pause, maxPause) {
		err := h.Ensure(ctx)
		if err == nil || ctx.Err() != nil {
			return nil
		}
		h.log.Error("there is no certificate", "identity", h.cfg.Identity.String(), "again_in", pause, "error", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

// Run renews the certificate before it expires, until ctx ends. While there is none Ensure is somebody else's to call.
func (h *Holder) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { _ = h.material.Run(ctx) }) // gives no errors
	failing := time.Duration(0)               // since the last certificate was due
	for {
		wait := minRetry
		if leaf := h.material.Leaf(); leaf != nil {
			wait = max(untilRenewal(leaf, h.cfg.RenewAt, time.Now()), failing)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		leaf := h.material.Leaf()
		if leaf == nil || !Due(leaf, h.cfg.RenewAt, time.Now()) { // else it came meanwhile, by Ensure or Enroll
			continue
		}
		if err := h.renew(ctx); err != nil && ctx.Err() == nil {
			failing = clampDuration(Life(leaf)/100, minRetry, maxRetry)
			left := time.Until(leaf.NotAfter).Round(time.Second)
			h.log.Warn("the certificate could not be renewed", "identity", h.cfg.Identity.String(), "left", left, "again_in", failing, "error", err)
			continue
		}
		failing = 0
	}
}

// renew gets the next certificate over a connection that the present one identifies, or by Ensure's ways.
func (h *Holder) renew(ctx context.Context) error {
	if !h.Valid() {
		return h.Ensure(ctx)
	}
	h.getting.Lock()
	defer h.getting.Unlock()
	err := h.get(ctx, func(csr []byte) ([][]byte, error) {
		return h.cfg.Remote.Renew(ctx, h.material.Client(Only(RoleServer)), csr, nil)
	})
	if err != nil {
		return err
	}
	h.log.Info("certificate renewed", "identity", h.cfg.Identity.String(), "expires", h.material.Leaf().NotAfter.UTC())
	return nil
}

// Life is how long a certificate was made for.
func Life(c *x509.Certificate) time.Duration { return c.NotAfter.Sub(c.NotBefore.Add(skew)) }

// untilRenewal is how long to wait before a certificate is renewed.
func untilRenewal(c *x509.Certificate, share float64, now time.Time) time.Duration {
	jitter := rand.N(max(1, time.Duration(float64(Life(c))*renewJitter)))
	return max(0, DueTime(c, share).Add(jitter).Sub(now))
}

// DueTime is when a certificate has lived the given share of its life.
func DueTime(c *x509.Certificate, share float64) time.Time {
	return c.NotBefore.Add(skew).Add(time.Duration(float64(Life(c)) * share))
}

// Due says whether a certificate has lived the given share of its life.
func Due(c *x509.Certificate, share float64, now time.Time) bool {
	return !now.Before(DueTime(c, share))
}

func clampDuration(d, low, high time.Duration) time.Duration { return max(low, min(d, high)) }

// ParseChain parses certificates, DER, leaf first; there is at least one and at most four.
func ParseChain(chain [][]byte) ([]*x509.Certificate, error) {
	if len(chain) == 0 || len(chain) > 4 {
		return nil, fmt.Errorf("a chain of %d certificates: expected 1 to 4", len(chain))
	}
	var certs []*x509.Certificate
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	return certs, nil
}
