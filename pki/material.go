package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// checkEvery is how often files are looked at for changes.
	checkEvery = 10 * time.Second
	// warnEvery is how often a certificate that will expire soon is warned of.
	warnEvery = 6 * time.Hour
	// warnAhead is the longest time before the end of a certificate at which warnings begin; shorter-lived ones are warned of
	// in the last tenth of their life.
	warnAhead = 30 * 24 * time.Hour
	// refusedEvery bounds the log lines about peers that were refused.
	refusedEvery = time.Second
)

// Config says what Material is made of.
type Config struct {
	CA   string // PEM file of the region's CA; several certificates while one replaces another
	Cert string // PEM file of the own certificate, and of the node CA's when that signed it
	Key  string // PEM file of its private key

	Region string
	Role   Role   // that the own certificate must name; "": any HTTPS certificate of any CA will do
	Name   string // that it must name; "": whatever it names
	// MayLack says that the certificate and its key may come later. Until then clients show none and servers refuse handshakes.
	MayLack bool

	Use        string // "wire", "https": the label of metrics, one for each Material of a registry
	Logger     *slog.Logger
	Registerer prometheus.Registerer // may be nil
}

// Material is one process's certificates. It is safe for concurrent use.
type Material struct {
	cfg     Config
	log     *slog.Logger
	current atomic.Pointer[loaded]

	mu     sync.Mutex // of Reload
	seen   []stamp
	warned time.Time

	reloads *prometheus.CounterVec
	refused prometheus.Counter
	lastLog atomic.Int64 // unix nanoseconds of the last line about a refused peer
}

// loaded is what the files held at one moment.
type loaded struct {
	pool *x509.CertPool
	cas  []*x509.Certificate
	cert *tls.Certificate // nil: none yet
	id   Identity
}

// Load reads the files and reports everything that is wrong with them at once.
func Load(cfg Config) (*Material, error) {
	m := &Material{
		cfg: cfg, log: cfg.Logger,
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rxvision_tls_reloads_total", Help: "Changed certificate files that were read, by result.",
			ConstLabels: prometheus.Labels{"use": cfg.Use},
		}, []string{"result"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "rxvision_tls_peers_refused_total", Help: "Connections refused because of the peer's certificate.",
			ConstLabels: prometheus.Labels{"use": cfg.Use},
		}),
	}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	m.seen = stamps(m.files())
	now, err := m.read(time.Now())
	if err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	m.current.Store(now)
	if cfg.Registerer != nil {
		for _, c := range []prometheus.Collector{m.reloads, m.refused, expiry{m}} {
			if err := cfg.Registerer.Register(c); err != nil {
				return nil, err
			}
		}
	}
	m.warn(time.Now())
	return m, nil
}

func (m *Material) files() []string { return []string{m.cfg.CA, m.cfg.Cert, m.cfg.Key} }

// read loads and checks the files.
func (m *Material) read(now time.Time) (*loaded, error) {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	l := &loaded{pool: x509.NewCertPool()}
	switch cas, err := ReadCerts(m.cfg.CA); {
	case m.cfg.CA == "" && m.cfg.Role == "":
	case m.cfg.CA == "":
		fault("the CA's file is missing: name it")
	case err != nil:
		fault("CA: %w", err)
	default:
		for _, c := range cas {
			if !c.IsCA {
				fault("CA: %s holds the certificate of %q, which is no CA", m.cfg.CA, c.Subject.CommonName)
				continue
			}
			l.pool.AddCert(c)
			l.cas = append(l.cas, c)
		}
		if !slices.ContainsFunc(l.cas, func(c *x509.Certificate) bool { return now.Before(c.NotAfter) }) && len(l.cas) > 0 {
			fault("CA: %s expired at %s", m.cfg.CA, l.cas[0].NotAfter.UTC().Format(time.DateTime))
		}
	}
	if m.cfg.MayLack && !exists(m.cfg.Cert) {
		return l, errors.Join(faults...)
	}
	certs, err := ReadCerts(m.cfg.Cert)
	if m.cfg.Cert == "" {
		err = errors.New("its file is missing: name it")
	}
	if err != nil {
		fault("certificate: %w", err)
	}
	key, err := ReadKey(m.cfg.Key)
	if m.cfg.Key == "" {
		err = errors.New("its file is missing: name it")
	}
	if err != nil {
		fault("key: %w", err)
	}
	if certs != nil {
		faults = append(faults, m.checkOwn(l, certs, now)...)
	}
	if certs != nil && key != nil {
		if !sameKey(certs[0].PublicKey, key.Public()) {
			fault("key: %s is not the key of %s", m.cfg.Key, m.cfg.Cert)
		}
		l.cert = &tls.Certificate{PrivateKey: key, Leaf: certs[0]}
		for _, c := range certs {
			l.cert.Certificate = append(l.cert.Certificate, c.Raw)
		}
	}
	return l, errors.Join(faults...)
}

// checkOwn checks the own certificate: who it names, its time, and that the CA signed it.
func (m *Material) checkOwn(l *loaded, certs []*x509.Certificate, now time.Time) (faults []error) {
	fault := func(format string, args ...any) {
		faults = append(faults, fmt.Errorf("certificate: %s: "+format, append([]any{m.cfg.Cert}, args...)...))
	}
	leaf := certs[0]
	switch {
	case now.After(leaf.NotAfter) && m.cfg.MayLack: // its holder renews it
	case now.After(leaf.NotAfter):
		fault("it expired at %s", leaf.NotAfter.UTC().Format(time.DateTime))
	case now.Before(leaf.NotBefore):
		fault("it is valid from %s on, and this host's clock says %s", leaf.NotBefore.UTC().Format(time.DateTime), now.UTC().Format(time.DateTime))
	}
	if m.cfg.Role == "" {
		return faults
	}
	id, err := IdentityOf(leaf)
	if err != nil {
		fault("%w", err)
	} else {
		l.id = id
		if id.Role != m.cfg.Role {
			fault("it is for role %s; role %s is needed here", id.Role, m.cfg.Role)
		}
		if m.cfg.Region != "" && id.Region != m.cfg.Region {
			fault("it is for region %s; this is region %s", id.Region, m.cfg.Region)
		}
		if m.cfg.Name != "" && id.Name != m.cfg.Name {
			fault("it is for %q; this is %q", id.Name, m.cfg.Name)
		}
	}
	if len(l.cas) == 0 {
		return faults
	}
	at := clamp(now, leaf.NotBefore, leaf.NotAfter) // its time was looked at
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: l.pool, Intermediates: pool(certs[1:]), CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		fault("it is not signed by the CA in %s: %w", m.cfg.CA, err)
	}
	return faults
}

// CAFile is the file of the region's CA.
func (m *Material) CAFile() string { return m.cfg.CA }

// Identity is who the own certificate names, the zero one while there is none.
func (m *Material) Identity() Identity { return m.current.Load().id }

// Leaf is the own certificate, nil while there is none.
func (m *Material) Leaf() *x509.Certificate {
	if c := m.current.Load().cert; c != nil {
		return c.Leaf
	}
	return nil
}

// Chain is the own certificate with what goes with it, DER, nil while there is none.
func (m *Material) Chain() [][]byte {
	if c := m.current.Load().cert; c != nil {
		return c.Certificate
	}
	return nil
}

// Reload reads the files again. When they are at fault what was read before stays in use, and the error says why.
func (m *Material) Reload() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen = stamps(m.files())
	l, err := m.read(time.Now())
	if err != nil {
		m.reloads.WithLabelValues("failed").Inc()
		return fmt.Errorf("TLS: the changed files are not used: %w", err)
	}
	m.reloads.WithLabelValues("done").Inc()
	m.current.Store(l)
	m.warned = time.Time{}
	if l.cert != nil {
		m.log.Info("certificates read", "use", m.cfg.Use, "file", m.cfg.Cert, "expires", l.cert.Leaf.NotAfter.UTC())
	}
	return nil
}

// Run reads files again that have changed, and warns of certificates that expire soon, until ctx ends.
func (m *Material) Run(ctx context.Context) error {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			m.check(now)
		}
	}
}

// check is one step of Run.
func (m *Material) check(now time.Time) {
	m.mu.Lock()
	changed := !slices.Equal(m.seen, stamps(m.files()))
	m.mu.Unlock()
	if changed {
		if err := m.Reload(); err != nil {
			m.log.Error("certificate files have changed and cannot be used; going on with the old ones", "use", m.cfg.Use, "error", err)
		}
	}
	m.warn(now)
}

// warn logs certificates that expire soon, now and then.
func (m *Material) warn(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now.Sub(m.warned) < warnEvery {
		return
	}
	l := m.current.Load()
	certs := slices.Clone(l.cas)
	if l.cert != nil && !m.cfg.MayLack { // a Holder speaks for itself
		certs = append(certs, l.cert.Leaf)
	}
	for _, c := range certs {
		if left := c.NotAfter.Sub(now); left < min(warnAhead, c.NotAfter.Sub(c.NotBefore)/10) {
			m.warned = now
			m.log.Warn("a certificate expires soon", "use", m.cfg.Use, "certificate", c.Subject.CommonName, "expires", c.NotAfter.UTC(), "left", left.Round(time.Minute))
		}
	}
}

// Server is for a listener: it shows the newest certificate and accepts only peers, who show theirs. TLS 1.3 only.
func (m *Material) Server(peers Peers) *tls.Config {
	c := &tls.Config{
		MinVersion: tls.VersionTLS13, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return m.own() },
		ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true, // who resumes would not be asked again
		VerifyConnection: func(state tls.ConnectionState) error {
			return m.verify(state, peers, x509.ExtKeyUsageClientAuth)
		},
	}
	if peers.Anonymous {
		c.ClientAuth = tls.RequestClientCert
	}
	return c
}

// HTTPS is for a listener that users call: TLS 1.2 too, HTTP/2, and client certificates only where peers name roles.
func (m *Material) HTTPS(peers Peers) *tls.Config {
	if len(peers.Roles) == 0 {
		return &tls.Config{
			MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return m.own() },
		}
	}
	c := m.Server(peers)
	c.MinVersion, c.NextProtos = tls.VersionTLS12, []string{"h2", "http/1.1"}
	return c
}

// Client is for dialling: it shows the newest certificate, when there is one, and expects one of peers at the other end.
func (m *Material) Client(peers Peers) *tls.Config {
	c := m.Anonymous(peers)
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if own := m.current.Load().cert; own != nil {
			return own, nil
		}
		return &tls.Certificate{}, nil // none
	}
	return c
}

// Anonymous is Client without a certificate of one's own.
func (m *Material) Anonymous(peers Peers) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// Who is at the other end is told by its identity, whatever its address: VerifyConnection does all that is skipped here.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			return m.verify(state, peers, x509.ExtKeyUsageServerAuth)
		},
	}
}

func (m *Material) own() (*tls.Certificate, error) {
	if c := m.current.Load().cert; c != nil {
		return c, nil
	}
	return nil, errors.New("there is no certificate yet")
}

// verify accepts or refuses the peer of a handshake.
func (m *Material) verify(state tls.ConnectionState, peers Peers, usage x509.ExtKeyUsage) error {
	if len(state.PeerCertificates) == 0 && peers.Anonymous {
		return nil
	}
	_, err := m.Verify(state.PeerCertificates, peers, usage, time.Now())
	if err == nil {
		return nil
	}
	m.refused.Inc()
	last, now := m.lastLog.Load(), time.Now().UnixNano()
	if now-last > int64(refusedEvery) && m.lastLog.CompareAndSwap(last, now) {
		m.log.Warn("a peer was refused because of its certificate", "use", m.cfg.Use, "error", err)
	}
	return err
}

// Verify says who a chain of certificates, leaf first, names, if the CA vouches for it and it is one of peers.
func (m *Material) Verify(chain []*x509.Certificate, peers Peers, usage x509.ExtKeyUsage, now time.Time) (Identity, error) {
	if len(chain) == 0 {
		return Identity{}, fmt.Errorf("the peer's certificate: %w: it showed none", ErrNoIdentity)
	}
	leaf := chain[0]
	id, err := IdentityOf(leaf)
	if err != nil {
		return Identity{}, fmt.Errorf("the peer's certificate %q: %w", leaf.Subject.CommonName, err)
	}
	at := now
	if now.After(leaf.NotAfter) && now.Sub(leaf.NotAfter) <= peers.Grace[id.Role] {
		at = leaf.NotAfter
	}
	if _, err := leaf.Verify(x509.VerifyOptions{
		Roots: m.current.Load().pool, Intermediates: pool(chain[1:]), CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{usage},
	}); err != nil {
		return Identity{}, fmt.Errorf("the peer's certificate, which claims to be %s: %w", id, err)
	}
	if err := peers.check(id, m.region()); err != nil {
		return Identity{}, fmt.Errorf("the peer's certificate: %w", err)
	}
	return id, nil
}

func (m *Material) region() string {
	if m.cfg.Region != "" {
		return m.cfg.Region
	}
	return m.current.Load().id.Region
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

func clamp(t, low, high time.Time) time.Time { return earlier(later(t, low), high) }

// stamp tells one content of a file from another without reading it.
type stamp struct {
	size  int64
	mtime time.Time
}

func stamps(files []string) []stamp {
	out := make([]stamp, len(files))
	for i, f := range files {
		if info, err := os.Stat(f); err == nil {
			out[i] = stamp{info.Size(), info.ModTime()}
		}
	}
	return out
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// expiry gives the seconds that are left to each certificate; negative ones have expired.
type expiry struct{ m *Material }

func (e expiry) desc() *prometheus.Desc {
	return prometheus.NewDesc("rxvision_tls_certificate_expiry_seconds", "Seconds until a certificate expires.",
		[]string{"certificate"}, prometheus.Labels{"use": e.m.cfg.Use})
}

// Describe implements prometheus.Collector.
func (e expiry) Describe(ch chan<- *prometheus.Desc) { ch <- e.desc() }

// Collect implements prometheus.Collector.
func (e expiry) Collect(ch chan<- prometheus.Metric) {
	l := e.m.current.Load()
	gauge := func(which string, c *x509.Certificate) {
		ch <- prometheus.MustNewConstMetric(e.desc(), prometheus.GaugeValue, time.Until(c.NotAfter).Seconds(), which)
	}
	if l.cert != nil {
		gauge("own", l.cert.Leaf)
	}
	newest := (*x509.Certificate)(nil)
	for _, c := range l.cas {
		if newest == nil || c.NotAfter.After(newest.NotAfter) {
			newest = c
		}
	}
	if newest != nil {
		gauge("ca", newest)
	}
}
