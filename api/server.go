package api

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/rxvision/rxvision/cluster"
)

// Store is what the API needs of the replicated store.
type Store interface {
	// Apply commits a command. The error is the rules' refusal, or says why the
	// command could not be committed.
	Apply(ctx context.Context, cmd cluster.Command) (cluster.Result, error)
	// State is the current state; a restore replaces it.
	State() *cluster.State
	// ReadIndex returns when State holds all that was committed when it was called, as
	// the leader knows it by its lease, or with verify by asking the quorum. The error
	// says why that cannot be known: mostly that there is no leader.
	ReadIndex(ctx context.Context, verify bool) error
	// IsLeader says whether this server leads, with all earlier entries applied.
	IsLeader() bool
	// Leader gives the leader's ID and Raft address, both empty when there is none.
	Leader() (id, address string)
	// NoLeader says why there is none, as far as this server knows.
	NoLeader() error
	// LastContact is how long ago the leader was heard of: 0 on the leader itself,
	// negative when it never was.
	LastContact() time.Duration
	// Stats are figures of replication by name.
	Stats() map[string]string
}

// Planner answers what the scheduler would do with a job, changing nothing.
type Planner interface {
	// DryRun plans job, a complete specification, as if it were registered on top of
	// snap. What the state sets at registration is the planner's to set, in a copy.
	DryRun(ctx context.Context, snap *cluster.Snapshot, job *cluster.Job) (*DryRun, error)
	// WhatIf is DryRun with all that the plan was made of: places, victims, what waits and why.
	WhatIf(ctx context.Context, snap *cluster.Snapshot, job *cluster.Job) (*cluster.Explanation, error)
	// Explain says of a job that snap has how it stands and what it waits for. Where it stands in the queue is the
	// leader's to say.
	Explain(ctx context.Context, snap *cluster.Snapshot, job cluster.JobKey) (*cluster.Explanation, error)
}

// Autoscaler says how scaling policies fare.
type Autoscaler interface {
	// ScalingStatus is how the leader found the policy of that ID when it last looked at it; nil when it has not.
	ScalingStatus(ctx context.Context, id string) (*cluster.ScalingStatus, error)
}

// DryRun is a Planner's answer.
type DryRun struct {
	Annotations *cluster.PlanAnnotations
	Failed      map[string]*cluster.AllocMetric // by group that would lack allocations
	Evals       []*cluster.Evaluation           // those that would be created
}

// Archives saves the state into the archives of `nomad operator snapshot` and
// restores it from them.
type Archives interface {
	Save(ctx context.Context) (*Archive, error)
	// Restore replaces the whole state. It bounds and checks what it reads before it
	// changes anything.
	Restore(ctx context.Context, r io.Reader) error
}

// Archive is a finished archive. Close it.
type Archive struct {
	io.ReadCloser
	Length int64
	Digest string // for the header Digest: sha-256=<base64>
}

// Models is the registry: what it takes in and gives out.
type Models interface {
	// Push stores body as the next version of a model. origin is the work that made
	// it, nil when nobody says.
	Push(ctx context.Context, name, description string, origin *cluster.ModelOrigin, body io.Reader) (*cluster.ModelVersion, error)
	// SetAlias points an alias at a version; version 0 removes it.
	SetAlias(ctx context.Context, model, alias string, version uint64) error
	// Open gives an artifact's bytes from an offset, and its whole size.
	Open(ctx context.Context, digest string, offset int64) (io.ReadCloser, int64, error)
}

// Config is what a Server is made of. Store, Logger and Registry are needed;
// routes of another part that is nil answer 501.
type Config struct {
	Store   Store
	Nodes   Nodes
	Planner Planner
	// Autoscaler tells of policies; nil: nothing is told of how they fare.
	Autoscaler Autoscaler
	Archives   Archives
	Models     Models
	Servers    Servers
	// Collector forgets what has ended, when an operator asks for it.
	Collector Collector

	ID         string // this server's, as in Servers
	Name       string
	Region     string
	Datacenter string
	Version    string // of rxvision
	// Drivers are the task drivers that jobs may name.
	Drivers []string

	ACL ACL

	Logger   *slog.Logger
	Registry *prometheus.Registry // ours go in, /v1/metrics gives all that is in it
	// LeaderWait is how long requests wait for a leader; 0 means DefaultLeaderWait.
	LeaderWait time.Duration
}

// DefaultLeaderWait is Nomad's.
const DefaultLeaderWait = 5 * time.Second

// Server serves the HTTP API. It is an http.Handler.
type Server struct {
	cfg     Config
	log     *slog.Logger
	routes  router
	metrics *metrics
	prom    http.Handler
	// blocked counts the blocking queries under way.
	blocked chan struct{}
	// explaining counts the explanations under way.
	explaining chan struct{}
	// compiled keeps what tokens' policies mean.
	compiled compiledACLs
}

// New makes a Server. It starts nothing.
func New(cfg Config) *Server {
	if cfg.LeaderWait == 0 {
		cfg.LeaderWait = DefaultLeaderWait
	}
	cfg.ACL.MinTokenTTL = cmp.Or(cfg.ACL.MinTokenTTL, defaultMinTokenTTL)
	cfg.ACL.MaxTokenTTL = cmp.Or(cfg.ACL.MaxTokenTTL, defaultMaxTokenTTL)
	s := &Server{
		cfg: cfg, log: cfg.Logger, blocked: make(chan struct{}, MaxBlocking), explaining: make(chan struct{}, maxExplaining),
		metrics: newMetrics(cfg.Registry),
		prom:    promhttp.HandlerFor(cfg.Registry, promhttp.HandlerOpts{}),
	}
	s.routes = newRouter(routes)
	return s
}

// Limits of connections. Blocking queries and streams may last, so whole requests
// have no limit; bodies and writes are limited where they are read and written.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 64 << 10
	// shutdownGrace is how long Serve lets requests end by themselves.
	shutdownGrace = 5 * time.Second
)

// NewHTTPServer makes a server with limits that fit this API: slow headers and
// idle connections end, blocking queries, uploads and streams do not.
func NewHTTPServer(addr string, handler http.Handler) *http.Server {
	return &http.Server{
		Addr: addr, Handler: handler,
		ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
	}
}

// Serve serves handler on l until ctx ends; then blocking queries and streams
// end at once and other requests have a few seconds. The error is nil after ctx
// has ended.
func Serve(ctx context.Context, l net.Listener, handler http.Handler) error {
	srv := NewHTTPServer(l.Addr().String(), handler)
	srv.BaseContext = func(net.Listener) context.Context { return ctx }
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancel()
	if err := srv.Shutdown(grace); err != nil {
		if err := srv.Close(); err != nil {
			return err
		}
	}
	if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
