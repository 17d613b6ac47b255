package fleet

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// Bounds of the wire.
const (
	// DefaultTTL is how long a node may be silent before it counts as down.
	DefaultTTL = 5 * time.Second
	// MaxMessage bounds one message either way, in bytes.
	MaxMessage = 8 << 20
	// MaxRoutes bounds a routes update, in bytes: all models at once when a gateway
	// connects.
	MaxRoutes = 64 << 20
	// MaxCalls bounds the reverse calls under way on one node.
	MaxCalls = 256

	// DefaultHelloTimeout is how long a new stream may take to name its node.
	DefaultHelloTimeout = 10 * time.Second
	// DefaultAnswerTimeout is how long a node may take to begin its answer to a call.
	DefaultAnswerTimeout = 10 * time.Second
	// DefaultCheckWait is how long a model check waits for a node that can do it.
	DefaultCheckWait = 10 * time.Second

	maxReports    = 16 // status reports of one node on their way into the log
	sendQueue     = 64
	answerQueue   = 16
	sweepBatch    = 2000 // nodes marked down in one log entry
	artifactChunk = 256 << 10
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

// Config is what a Server is made of. A duration of 0 means its default.
type Config struct {
	Name       string
	Store      Store
	Blobs      Blobs
	Logger     *slog.Logger
	Registerer prometheus.Registerer

	TTL           time.Duration
	HelloTimeout  time.Duration
	AnswerTimeout time.Duration
	CheckWait     time.Duration
}

// Server answers the Fleet service. Register it with a gRPC server and keep Run
// running.
type Server struct {
	pb.UnimplementedFleetServer
	cfg     Config
	log     *slog.Logger
	updates *batcher

	mu       sync.Mutex
	sessions map[string]*session  // by node ID
	gone     map[string]time.Time // when a node without a session was last heard of
	answers  map[string]*Answer   // by call ID
	gateways int
	attached chan struct{} // closed, and made anew, when a node attaches
}

// NewServer makes a server; nothing runs until Run.
func NewServer(cfg Config) *Server {
	cfg.TTL = cmp.Or(cfg.TTL, DefaultTTL)
	cfg.HelloTimeout = cmp.Or(cfg.HelloTimeout, DefaultHelloTimeout)
	cfg.AnswerTimeout = cmp.Or(cfg.AnswerTimeout, DefaultAnswerTimeout)
	cfg.CheckWait = cmp.Or(cfg.CheckWait, DefaultCheckWait)
	s := &Server{
		cfg: cfg, log: cfg.Logger,
		sessions: map[string]*session{}, gone: map[string]time.Time{}, answers: map[string]*Answer{},
		attached: make(chan struct{}),
	}
	s.updates = newBatcher(cfg.Store)
	cfg.Registerer.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "rxvision_fleet_nodes_connected", Help: "Nodes whose stream this server holds.",
		}, func() float64 { s.mu.Lock(); defer s.mu.Unlock(); return float64(len(s.sessions)) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "rxvision_fleet_gateways_connected", Help: "Gateways that watch routes on this server.",
		}, func() float64 { s.mu.Lock(); defer s.mu.Unlock(); return float64(s.gateways) }),
		s.updates.batches,
	)
	return s
}

// Run keeps node status true and commits what nodes report, until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Add(1)
	go func() { defer wg.Done(); s.updates.run(ctx) }()
	defer wg.Wait()
	tick := time.NewTicker(s.cfg.TTL / 4)
	defer tick.Stop()
	var leaderSince time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			if !s.cfg.Store.IsLeader() {
				leaderSince = time.Time{}
				continue
			}
			if leaderSince.IsZero() {
				leaderSince = now
			}
			s.sweep(ctx, now, leaderSince)
		}
	}
}

// sweep marks nodes down that were silent for a TTL. A fresh leader gives every
// node one TTL to find it.
func (s *Server) sweep(ctx context.Context, now, leaderSince time.Time) {
	s.mu.Lock()
	for id, heard := range s.gone { // older than this it says no more than its absence
		if now.Sub(heard) > s.cfg.TTL {
			delete(s.gone, id)
		}
	}
	s.mu.Unlock()
	var silent []cluster.NodeStatusUpdate
	for _, n := range s.cfg.Store.State().Snapshot().Nodes(nil, "") {
		if n.Status != cluster.NodeStatusReady && n.Status != cluster.NodeStatusInit {
			continue
		}
		last := leaderSince
		if heard := s.lastHeard(n.ID); heard.After(last) {
			last = heard
		}
		if now.Sub(last) > s.cfg.TTL {
			silent = append(silent, cluster.NodeStatusUpdate{
				NodeID: n.ID, Status: cluster.NodeStatusDown, Message: "Node heartbeat missed",
			})
		}
	}
	for batch := range slices.Chunk(silent, sweepBatch) {
		if _, err := s.cfg.Store.Apply(ctx, &cluster.UpdateNodeStatus{Updates: batch}); err != nil {
			s.log.Warn("silent nodes could not be marked down", "count", len(batch), "error", err)
			return
		}
		for _, u := range batch {
			s.log.Warn("node is down: no heartbeat", "node", u.NodeID, "ttl", s.cfg.TTL)
			s.mu.Lock()
			sess := s.sessions[u.NodeID]
			s.mu.Unlock()
			if sess != nil {
				sess.cancel(status.Error(codes.DeadlineExceeded, "no heartbeat within the TTL")) // it registers anew
			}
		}
	}
}

func (s *Server) lastHeard(nodeID string) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sess := s.sessions[nodeID]; sess != nil {
		return sess.heard()
	}
	return s.gone[nodeID]
}

// Connected says whether this server holds the node's stream.
func (s *Server) Connected(nodeID string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sessions[nodeID] != nil
}

// adopt makes sess the node's session; an older one ends.
func (s *Server) adopt(sess *session) {
	s.mu.Lock()
	old := s.sessions[sess.nodeID]
	s.sessions[sess.nodeID] = sess
	delete(s.gone, sess.nodeID)
	close(s.attached)
	s.attached = make(chan struct{})
	s.mu.Unlock()
	if old != nil {
		old.cancel(status.Error(codes.Aborted, "a newer session of this node took over"))
	}
}

func (s *Server) drop(sess *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions[sess.nodeID] == sess {
		delete(s.sessions, sess.nodeID)
		s.gone[sess.nodeID] = sess.heard()
	}
}

// Attach implements pb.FleetServer: one node's stream.
func (s *Server) Attach(stream pb.Fleet_AttachServer) error {
	node, err := s.hello(stream)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	sess := newSession(ctx, cancel, s, node.ID)
	s.mu.Lock()
	s.gone[node.ID] = sess.heard() // not silent while it registers
	s.mu.Unlock()
	if err := s.register(ctx, node); err != nil {
		return err
	}
	s.adopt(sess)
	defer s.drop(sess)
	s.log.Info("node attached", "node", node.ID, "name", node.Name)
	err = sess.run(stream)
	s.log.Info("node detached", "node", node.ID, "reason", err)
	return err
}

// hello awaits the first message, which must name a node, for a bounded time.
func (s *Server) hello(stream pb.Fleet_AttachServer) (*cluster.Node, error) {
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
		return nil, status.Errorf(codes.DeadlineExceeded, "no hello within %s", s.cfg.HelloTimeout)
	}
	if f.err != nil {
		return nil, f.err
	}
	h := f.msg.GetHello()
	if h == nil {
		return nil, status.Error(codes.InvalidArgument, "the first message must be hello")
	}
	if h.Protocol != 1 {
		return nil, status.Errorf(codes.FailedPrecondition, "protocol %d is not spoken here; this server speaks 1", h.Protocol)
	}
	return decodeNode(h.Node)
}

func decodeNode(b []byte) (*cluster.Node, error) {
	n := new(cluster.Node)
	if err := cluster.Unmarshal(b, n); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "node record: %v", err)
	}
	return n, nil
}

func (s *Server) register(ctx context.Context, n *cluster.Node) error {
	n.Status = cluster.NodeStatusReady
	if _, err := s.cfg.Store.Apply(ctx, &cluster.RegisterNode{Node: n}); err != nil {
		return toStatus(err)
	}
	return nil
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

// Artifact implements pb.FleetServer.
func (s *Server) Artifact(req *pb.ArtifactRequest, stream pb.Fleet_ArtifactServer) error {
	r, size, err := s.cfg.Blobs.Open(stream.Context(), req.Digest, req.Offset)
	if err != nil {
		return toStatus(err)
	}
	defer r.Close()
	buf, first := make([]byte, artifactChunk), true
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 || first {
			chunk := &pb.ArtifactChunk{Data: buf[:n]}
			if first {
				chunk.Size, first = size, false
			}
			if err := stream.Send(chunk); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return toStatus(err)
		}
	}
}
