package fleet

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// Bounds of the wire.
const (
	// MaxMessage bounds one message either way, in bytes.
	MaxMessage = 8 << 20
	// MaxRoutes bounds the routes of one model, in bytes; updates of many come in parts.
	MaxRoutes = 64 << 20
	// MaxCalls bounds the reverse calls under way on one node.
	MaxCalls = 256

	// DefaultTTL is how long a node of a small region may be silent before it
	// counts as down. With DefaultRate it holds up to 1,750 nodes; it leaves time
	// to notice within 5 s what died together with the server that held it.
	DefaultTTL = 3500 * time.Millisecond
	// DefaultRate is how many nodes a region may have for each second of its TTL.
	DefaultRate = 500
	// DefaultHelloTimeout is how long a new stream may take to name its node.
	DefaultHelloTimeout = 10 * time.Second
	// DefaultAnswerTimeout is how long a node may take to begin its answer to a call.
	DefaultAnswerTimeout = 10 * time.Second
	// DefaultCheckWait is how long a model check waits for a node that can do it.
	DefaultCheckWait = 10 * time.Second
	// DefaultHoldShare is how many of 100 ready nodes may fall silent within one TTL
	// before replacements pause.
	DefaultHoldShare = 30
	// DefaultHoldNodes is the fewest silent nodes that can pause replacements.
	DefaultHoldNodes = 3
	// DefaultHoldLimit is how long replacements pause at most.
	DefaultHoldLimit = 10 * time.Minute

	maxReports     = 16       // status reports of one node on their way into the log …
	maxReportBytes = 16 << 20 // … and their bytes
	sendQueue      = 64
	answerQueue    = 16
	sweepAllocs    = 10_000 // allocations on the nodes whose status changes in one log entry
	artifactChunk  = 256 << 10
	desiredPart    = 256 << 10 // bytes of one message of desired state: slow links still carry heartbeats
	catchUpLimit   = 10 * time.Second
	leastLag       = 100 * time.Millisecond // what timers are late anyway
	admitPause     = 250 * time.Millisecond // between attempts to register while nobody leads
)

// Store is what fleet needs of the replicated store.
type Store interface {
	Apply(ctx context.Context, cmd cluster.Command) (cluster.Result, error)
	State() *cluster.State
	IsLeader() bool
}

// Blobs gives the bytes of an artifact from an offset, and its whole size.
type Blobs interface {
	Open(ctx context.Context, digest string, offset int64) (io.ReadCloser, int64, error)
}

// Config is what a Server is made of. A number or duration of 0 means its default.
type Config struct {
	Name  string
	Store Store
	Peers PeerNet // the other servers; nil: there are none
	// ReadIndex returns when the Store's State holds all that was committed when it
	// was called, as the leader knows it; verify has the leader ask the quorum. Nil:
	// this server is alone and its state always the newest.
	ReadIndex  func(ctx context.Context, verify bool) error
	Blobs      Blobs
	Logger     *slog.Logger
	Registerer prometheus.Registerer

	// RequireIdentity says that callers are known by their certificates, and may act
	// for themselves only; else, without TLS, everybody is believed.
	RequireIdentity bool
	Issuer          Issuer // signs for nodes, gateways and workers; nil: nothing is signed

	TTL           time.Duration // the least; it grows with the region
	Rate          int           // nodes for each second of the TTL
	HelloTimeout  time.Duration
	AnswerTimeout time.Duration
	CheckWait     time.Duration
	HoldShare     int           // of 100; 100: replacements never pause
	HoldNodes     int           // fewest silent nodes that pause replacements
	HoldLimit     time.Duration // longest pause
}

func (c *Config) defaults() {
	c.TTL = cmp.Or(c.TTL, DefaultTTL)
	c.Rate = cmp.Or(c.Rate, DefaultRate)
	c.HelloTimeout = cmp.Or(c.HelloTimeout, DefaultHelloTimeout)
	c.AnswerTimeout = cmp.Or(c.AnswerTimeout, DefaultAnswerTimeout)
	c.CheckWait = cmp.Or(c.CheckWait, DefaultCheckWait)
	c.HoldShare = cmp.Or(c.HoldShare, DefaultHoldShare)
	c.HoldNodes = cmp.Or(c.HoldNodes, DefaultHoldNodes)
	c.HoldLimit = cmp.Or(c.HoldLimit, DefaultHoldLimit)
}

// Server answers the Fleet service. Register it with a gRPC server and keep Run
// running, which serves the other servers.
type Server struct {
	pb.UnimplementedFleetServer
	cfg       Config
	log       *slog.Logger
	born      time.Time // what silence is measured by: this clock does not jump
	updates   *batcher
	routes    *routeTable
	caught    *barrier
	ttl       atomic.Int64 // as nodes are told, nanoseconds
	lag       atomic.Int64 // how late this server does things lately, nanoseconds
	judge     judge        // of Run's goroutine
	metrics   *metrics
	enrolling chan struct{} // a slot for each enrolment under way

	mu       sync.Mutex
	sessions map[string]*session  // by node ID
	gone     map[string]time.Time // when a node without a session was last heard of
	awake    time.Time            // since then this server runs without a gap: nobody was silent before
	cutOff   bool                 // from the leader
	views    map[string]*view     // what other servers said, by server ID
	peers    map[string]*peer     // whom this server tells, by server ID
	answers  map[string]*call     // by call ID
	gateways int
	attached chan struct{} // closed, and made anew, when a node attaches to any server

	samples *window
}

type metrics struct {
	silenced   *prometheus.CounterVec
	refused    prometheus.Counter
	enrolments *prometheus.CounterVec
}

// NewServer makes a server; nothing runs until Run.
func NewServer(cfg Config) *Server {
	cfg.defaults()
	now := time.Now()
	s := &Server{
		cfg: cfg, log: cfg.Logger, born: now, awake: now,
		sessions: map[string]*session{}, gone: map[string]time.Time{}, answers: map[string]*call{},
		views: map[string]*view{}, peers: map[string]*peer{},
		attached: make(chan struct{}), samples: newWindow(), enrolling: make(chan struct{}, maxEnrolling),
	}
	s.ttl.Store(int64(cfg.TTL))
	s.judge = judge{server: s, ttl: cfg.TTL, absent: map[string]time.Time{}, fell: map[string]time.Time{}}
	s.updates = newBatcher(cfg.Store, s.log)
	s.routes = &routeTable{store: cfg.Store}
	s.caught = newBarrier(func(ctx context.Context) error {
		if cfg.ReadIndex == nil {
			return nil
		}
		ctx, cancel := context.WithTimeout(ctx, catchUpLimit)
		defer cancel()
		err := cfg.ReadIndex(ctx, false)
		if ctx.Err() != nil && err != nil {
			return cluster.Errorf(cluster.CodeUnavailable, "this server could not catch up with the leader within %s", catchUpLimit)
		}
		return err
	})
	s.metrics = &metrics{
		silenced: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rxvision_fleet_nodes_silent_total", Help: "Nodes that this leader counted as down or disconnected because they were silent.",
		}, []string{"status"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "rxvision_fleet_sessions_refused_total", Help: "Streams of nodes that this server refused because it is cut off from the leader.",
		}),
		enrolments: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rxvision_fleet_enrolments_total", Help: "Nodes and gateways that asked to enrol, by result.",
		}, []string{"result"}),
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return value()
		})
	}
	cfg.Registerer.MustRegister(
		gauge("rxvision_fleet_nodes_connected", "Nodes whose stream this server holds.", func() float64 { return float64(len(s.sessions)) }),
		gauge("rxvision_fleet_gateways_connected", "Gateways that watch routes on this server.", func() float64 { return float64(s.gateways) }),
		gauge("rxvision_fleet_ttl_seconds", "How long a node may be silent before it counts as down.", func() float64 { return s.TTL().Seconds() }),
		gauge("rxvision_fleet_hold", "1 while replacements pause because many nodes fell silent at once.", func() float64 {
			if cfg.Store.State().Snapshot().FleetHold(nil) != nil {
				return 1
			}
			return 0
		}),
		s.metrics.silenced, s.metrics.refused, s.metrics.enrolments, s.updates.batches,
	)
	return s
}

// TTL is how long a node may be silent now before it counts as down.
func (s *Server) TTL() time.Duration { return time.Duration(s.ttl.Load()) }

// beat is how often servers look after silent nodes and tell each other of theirs.
func (s *Server) beat() time.Duration {
	return min(max(s.TTL()/10, 20*time.Millisecond), time.Second)
}

// Run keeps node status true, commits what nodes report and serves the other
// servers, until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer s.caught.close()
	defer cancel(nil)
	wg.Go(func() { s.updates.run(ctx) })
	if s.cfg.Peers != nil {
		wg.Go(func() {
			if err := s.servePeers(ctx); err != nil {
				cancel(fmt.Errorf("serve the other servers: %w", err))
			}
		})
	}
	var last time.Time
	for {
		now := time.Now()
		if !last.IsZero() && now.Sub(last) > s.TTL()/2 {
			s.log.Warn("this server stood still: nodes get a new TTL from now", "for", now.Sub(last))
			s.mu.Lock()
			s.awake = now
			s.mu.Unlock()
		}
		last = now
		s.judge.look(ctx, now)
		s.tellPeers(ctx, &wg)
		s.checkCut(now)
		s.balance(now)
		due := time.Now().Add(s.beat())
		select {
		case <-ctx.Done():
			if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
				return err
			}
			return nil
		case <-time.After(s.beat()):
			s.noteLag(time.Since(due))
		}
	}
}

// noteLag remembers how late a timer was: as late may heartbeats be read that are
// there already. It is forgotten within some beats.
func (s *Server) noteLag(late time.Duration) {
	lag := time.Duration(s.lag.Load())
	lag -= lag / 16
	if late > leastLag {
		lag = max(lag, late)
	}
	if lag < leastLag {
		lag = 0
	}
	s.lag.Store(int64(lag))
}

// heard is when a node whose session is here was last heard of, as far as an
// overloaded server can say. Hold mu.
func (s *Server) heard(sess *session, now time.Time) time.Time {
	at := sess.heard().Add(time.Duration(s.lag.Load()))
	if at.After(now) {
		at = now
	}
	if at.Before(s.awake) {
		at = s.awake
	}
	return at
}

// adopt makes sess the node's session; an older one ends.
func (s *Server) adopt(sess *session) {
	s.mu.Lock()
	old := s.sessions[sess.nodeID]
	s.sessions[sess.nodeID] = sess
	delete(s.gone, sess.nodeID)
	s.noteAttached()
	s.mu.Unlock()
	if old != nil {
		old.cancel(status.Error(codes.Aborted, "a newer session of this node took over"))
	}
}

// noteAttached wakes who waits for a node and tells the other servers soon. Hold mu.
func (s *Server) noteAttached() {
	close(s.attached)
	s.attached = make(chan struct{})
	s.kickPeers()
}

func (s *Server) drop(sess *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions[sess.nodeID] == sess {
		delete(s.sessions, sess.nodeID)
		s.gone[sess.nodeID] = sess.heard()
		s.kickPeers()
	}
}

// Attach implements pb.FleetServer: one node's stream.
func (s *Server) Attach(stream pb.Fleet_AttachServer) error {
	who, err := s.identify(stream.Context(), "Attach")
	if err != nil {
		return err
	}
	hello, node, err := s.hello(stream)
	if err != nil {
		return err
	}
	if err := who.speaksFor(node.ID); err != nil {
		return err
	}
	s.mu.Lock()
	refuse := s.cutOff && !hello.Any
	s.mu.Unlock()
	if refuse {
		s.metrics.refused.Inc()
		return errCutOff
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	sess := newSession(ctx, cancel, s, hello, node, who.key)
	s.adopt(sess)
	defer s.drop(sess)
	s.log.Debug("node attached", "node", node.ID, "name", node.Name)
	err = sess.run(stream)
	s.log.Debug("node detached", "node", node.ID, "reason", err)
	return err
}

// hello awaits the first message, which must name a node, for a bounded time.
func (s *Server) hello(stream pb.Fleet_AttachServer) (*pb.Hello, *cluster.Node, error) {
	type first struct {
		msg *pb.NodeMessage
		err error
	}
	ch := make(chan first, 1)
	go func() { // ends with the stream at the latest
		msg, err := stream.Recv()
		ch <- first{msg, err}
	}()
	var f first
	select {
	case f = <-ch:
	case <-time.After(s.cfg.HelloTimeout):
		return nil, nil, status.Errorf(codes.DeadlineExceeded, "no hello within %s", s.cfg.HelloTimeout)
	}
	if f.err != nil {
		return nil, nil, f.err
	}
	h := f.msg.GetHello()
	if h == nil {
		return nil, nil, status.Error(codes.InvalidArgument, "the first message must be hello")
	}
	if h.Protocol != 1 {
		return nil, nil, status.Errorf(codes.FailedPrecondition, "protocol %d is not spoken here; this server speaks 1", h.Protocol)
	}
	n, err := decodeNode(h.Node)
	if err == nil && n.ID == "" {
		err = status.Error(codes.InvalidArgument, "the node record has no ID")
	}
	return h, n, err
}

func decodeNode(b []byte) (*cluster.Node, error) {
	n := new(cluster.Node)
	if err := cluster.Unmarshal(b, n); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "node record: %v", err)
	}
	return n, nil
}

// admit makes the state count the node as ready and returns when this server's
// state is no older than what any server may have told the node before. It waits
// while nobody leads, so that a change of leaders costs nodes nothing. A record
// that the state holds already makes no log entry. key, when not "", is what the node
// must be enrolled with.
func (s *Server) admit(ctx context.Context, n *cluster.Node, key string) error {
	n.Status = cluster.NodeStatusReady
	cmd := &cluster.RegisterNode{Node: n, KeyHash: key} // one command, so that a repeated attempt counts once
	for registered := false; ; {
		err := s.caught.wait(ctx)
		if err == nil && key != "" { // a purged node that calls again and again makes no log entries
			if refused := s.cfg.Store.State().Snapshot().EnrolledAs(n.ID, n.Name, key); refused != nil {
				return toStatus(refused)
			}
		}
		if err == nil && (registered || s.registered(n)) {
			return nil
		}
		if err == nil {
			_, err = s.cfg.Store.Apply(ctx, cmd)
			registered = err == nil
		}
		switch cluster.CodeOf(err) {
		case "":
			continue
		case cluster.CodeNoLeader, cluster.CodeUnavailable:
		default:
			return toStatus(err)
		}
		select {
		case <-time.After(admitPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// registered says whether the state counts the node as ready, with this record.
func (s *Server) registered(n *cluster.Node) bool {
	old := s.cfg.Store.State().Snapshot().Node(nil, n.ID)
	if old == nil || old.Status != cluster.NodeStatusReady {
		return false
	}
	is, said := *old, *n
	for _, r := range []*cluster.Node{&is, &said} { // what is the servers' own
		r.StatusDescription, r.StatusUpdatedAt, r.SchedulingEligibility = "", 0, ""
		r.Drain, r.DrainStrategy, r.LastDrain, r.Events = false, nil, nil, nil
		r.CreateIndex, r.ModifyIndex = 0, 0
		if r.ReservedResources == nil {
			r.ReservedResources = &cluster.NodeReservedResources{}
		}
	}
	return bytes.Equal(cluster.Marshal(&is), cluster.Marshal(&said))
}

// toStatus carries a cluster.Error over gRPC: its text stays, its code maps to
// the nearest of gRPC's.
func toStatus(err error) error {
	code := codes.Internal
	switch cluster.CodeOf(err) {
	case cluster.CodeInvalid, cluster.CodeUnknownModel, cluster.CodeTooLarge:
		code = codes.InvalidArgument
	case cluster.CodeNotFound:
		code = codes.NotFound
	case cluster.CodeNoLeader, cluster.CodeUnavailable:
		code = codes.Unavailable
	case cluster.CodeForbidden:
		code = codes.PermissionDenied
	}
	if errors.Is(err, context.Canceled) {
		code = codes.Canceled
	}
	return status.Error(code, err.Error())
}
