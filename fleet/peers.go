package fleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// PeerNet is the network of the servers among themselves: who they are, who leads,
// and connections between them that are authenticated already.
type PeerNet interface {
	Self() string                 // this server's ID
	Servers() []string            // the IDs of all servers, this one may be among them
	Leader() (id string, ok bool) // as this server knows it
	Contact() time.Duration       // since it heard of the leader, reports aside; negative: it never did
	Listener() net.Listener       // gives the connections that others dial; Run closes it
	Dial(ctx context.Context, serverID string) (net.Conn, error)
}

const (
	// maxPeerMessage bounds a message between servers: a report of all of 100,000
	// nodes fits well.
	maxPeerMessage = 16 << 20
	// gatherTime is how long news of sessions wait for more.
	gatherTime = 10 * time.Millisecond
	// insistTime is how long nodes that found no better server stay with one that is
	// cut off before they look again.
	insistTime = 30 * time.Second
	// balanceSlack is how many nodes a server may hold over nine eighths of its share.
	balanceSlack = 4
	// balanceSteps is in how many steps, of a beat each, a server gives away what it
	// holds too many of.
	balanceSteps = 32
)

var (
	errCutOff  = status.Error(codes.Unavailable, "this server is cut off from the leader: use another one")
	errBalance = status.Error(codes.Unavailable, "this server holds more nodes than others: use another one")
)

// peer is another server as this one tells it of its sessions.
type peer struct {
	id   string
	kick chan struct{} // capacity 1: there is news
	stop context.CancelFunc

	// Guarded by Server.mu.
	conn  *grpc.ClientConn
	acked time.Time // when it last answered a report
}

// servePeers answers the other servers until ctx ends.
func (s *Server) servePeers(ctx context.Context) error {
	rpc := grpc.NewServer(grpc.MaxRecvMsgSize(maxPeerMessage), grpc.MaxSendMsgSize(maxPeerMessage), grpc.WaitForHandlers(true))
	pb.RegisterPeersServer(rpc, &peerService{server: s})
	defer context.AfterFunc(ctx, rpc.Stop)()
	err := rpc.Serve(s.cfg.Peers.Listener())
	rpc.Stop()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// tellPeers keeps one goroutine per other server that tells it of our sessions.
func (s *Server) tellPeers(ctx context.Context, wg *sync.WaitGroup) {
	if s.cfg.Peers == nil {
		return
	}
	self, ids := s.cfg.Peers.Self(), s.cfg.Peers.Servers()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		if id == self || s.peers[id] != nil {
			continue
		}
		ctx, stop := context.WithCancel(ctx)
		p := &peer{id: id, kick: make(chan struct{}, 1), stop: stop}
		s.peers[id] = p
		wg.Go(func() { s.tell(ctx, p) })
	}
	for id, p := range s.peers {
		if !slices.Contains(ids, id) {
			p.stop()
			delete(s.peers, id)
		}
	}
}

// kickPeers has news told soon. Hold mu.
func (s *Server) kickPeers() {
	for _, p := range s.peers {
		select {
		case p.kick <- struct{}{}:
		default:
		}
	}
}

// tell keeps reporting to one server until ctx ends.
func (s *Server) tell(ctx context.Context, p *peer) {
	var failing time.Time // when it last took a report before this trouble began
	for {
		err := s.report(ctx, p)
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		fresh := failing.IsZero() || p.acked.After(failing)
		s.mu.Unlock()
		if fresh {
			failing = time.Now()
			s.log.Warn("a server does not take reports of sessions", "server", p.id, "error", err)
		}
		select {
		case <-time.After(s.beat()):
		case <-ctx.Done():
			return
		}
	}
}

// report is one connection's life. A server that does not answer for half a TTL
// gets a new one.
func (s *Server) report(ctx context.Context, p *peer) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	conn, err := grpc.NewClient("passthrough:///"+p.id,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // PeerNet has authenticated both ends
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.cfg.Peers.Dial(ctx, p.id) }),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: s.beat(), Multiplier: 1, MaxDelay: s.beat()}, MinConnectTimeout: s.TTL() / 2,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxPeerMessage), grpc.MaxCallSendMsgSize(maxPeerMessage)),
	)
	if err != nil {
		return err
	}
	s.mu.Lock()
	p.conn = conn
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		p.conn = nil
		s.mu.Unlock()
		conn.Close()
	}()
	limit := s.TTL() / 2
	quiet := time.AfterFunc(limit, func() { cancel(fmt.Errorf("server %s has not answered for %s", p.id, limit)) })
	defer quiet.Stop()
	stream, err := pb.NewPeersClient(conn).Sessions(ctx)
	if err != nil {
		return err
	}
	wg.Go(func() {
		for {
			if _, err := stream.Recv(); err != nil {
				cancel(err)
				return
			}
			quiet.Reset(limit)
			s.mu.Lock()
			p.acked = time.Now()
			s.mu.Unlock()
		}
	})
	told, measured := map[string]time.Time{}, s.samples.newest()
	for seq := uint64(1); ; seq++ {
		r := s.sessionsReport(told, seq == 1)
		r.Seq = seq
		r.Samples, measured = s.samples.since(measured)
		if err := stream.Send(r); err != nil && !errors.Is(err, io.EOF) { // the reason for EOF comes with Recv
			return errors.Join(context.Cause(ctx), err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(s.beat()):
		case <-p.kick:
			select {
			case <-time.After(gatherTime):
			case <-ctx.Done():
			}
		}
	}
}

// sessionsReport is what changed since told, or everything.
func (s *Server) sessionsReport(told map[string]time.Time, full bool) *pb.SessionsReport {
	r := &pb.SessionsReport{Full: full}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	entry := func(id string, heard time.Time) *pb.NodeHeard {
		return &pb.NodeHeard{Node: id, AgeMs: uint32(max(now.Sub(heard), 0) / time.Millisecond)}
	}
	for id, sess := range s.sessions {
		heard := s.heard(sess, now)
		if !told[id].Equal(heard) {
			told[id] = heard
			r.Held = append(r.Held, entry(id, heard))
		}
	}
	for id, heard := range s.gone {
		if _, was := told[id]; was || full {
			delete(told, id)
			r.Gone = append(r.Gone, entry(id, heard))
		}
	}
	if full {
		r.Server = s.cfg.Peers.Self()
	}
	return r
}

// checkCut sends nodes to other servers while this one hears nothing of the
// leader, or, while nobody leads, of any other server. A leader that is heard but does
// not answer reports is slow: to move a third of all nodes would make it slower, so it
// gets twice the time.
func (s *Server) checkCut(now time.Time) {
	if s.cfg.Peers == nil {
		return
	}
	leads := s.cfg.Store.IsLeader()
	leader, known := s.cfg.Peers.Leader()
	limit := s.TTL() / 2
	if contact := s.cfg.Peers.Contact(); known && contact >= 0 && contact <= limit {
		limit *= 2
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.awake
	for id, p := range s.peers {
		if (!known || id == leader) && p.acked.After(last) {
			last = p.acked
		}
	}
	leads = leads || leader == s.cfg.Peers.Self()
	cut := !leads && len(s.peers) > 0 && now.Sub(last) > limit
	if cut != s.cutOff {
		s.cutOff = cut
		if cut {
			s.log.Error("cut off from the leader: nodes are sent to other servers", "leader", leader)
		} else {
			s.log.Warn("in touch with the leader again", "leader", leader)
		}
	}
	if !cut {
		return
	}
	for _, sess := range s.sessions {
		if !sess.any || now.Sub(sess.began) > insistTime {
			sess.cancel(errCutOff)
		}
	}
}

// balance sends some nodes to the other servers while this one holds many more than
// its share of them: a server that was away comes back without any, and what the others
// hold, and have to do, would stay theirs. It goes slowly, as nobody waits for it.
func (s *Server) balance(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	servers, nodes := 1, len(s.sessions)
	for id := range s.peers {
		if v := s.views[id]; v != nil && now.Sub(v.reported) <= s.TTL()/2 {
			servers++
			nodes += len(v.held)
		}
	}
	share := nodes / servers
	move := len(s.sessions) - share
	if move <= share/8+balanceSlack {
		return
	}
	move = max(1, move/balanceSteps)
	for _, sess := range s.sessions {
		if move == 0 {
			return
		}
		if !sess.any && now.Sub(sess.began) > insistTime { // any: it has no choice
			sess.cancel(errBalance)
			move--
		}
	}
}

// peerService answers the other servers.
type peerService struct {
	pb.UnimplementedPeersServer
	server *Server
}

// Sessions implements pb.PeersServer: what another server says of its nodes.
func (p *peerService) Sessions(stream pb.Peers_SessionsServer) error {
	s := p.server
	var v *view
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if (v == nil) != r.Full || r.Full && r.Server == "" {
			return status.Error(codes.InvalidArgument, "the first report, and no other, must be full and name its server")
		}
		now := time.Now()
		s.mu.Lock()
		if r.Full {
			old := s.views[r.Server]
			v = &view{held: map[string]time.Time{}, gone: map[string]time.Time{}}
			if old != nil { // a server that restarted may have forgotten whom it held
				v.gone = old.gone
				for id, heard := range old.held {
					v.gone[id] = old.heldAt(heard, now, s.TTL())
				}
			}
			s.views[r.Server] = v
		}
		if v.take(r, now) {
			close(s.attached)
			s.attached = make(chan struct{})
		}
		s.endStale(r, now)
		s.mu.Unlock()
		if err := s.samples.take(r.Samples, "", false, now); err != nil {
			return err
		}
		if err := stream.Send(&pb.SessionsReply{Seq: r.Seq}); err != nil {
			return err
		}
	}
}

// endStale ends sessions here whose nodes have been heard elsewhere since they fell
// silent here. Hold mu.
func (s *Server) endStale(r *pb.SessionsReport, now time.Time) {
	for _, n := range r.Held {
		sess := s.sessions[n.Node]
		if sess != nil && now.Sub(sess.heard())-time.Duration(n.AgeMs)*time.Millisecond > s.TTL()/2 {
			sess.cancel(status.Error(codes.Aborted, "this node is connected to another server"))
		}
	}
}

// take notes a report; true when it names a node that was not held before.
func (v *view) take(r *pb.SessionsReport, now time.Time) (fresh bool) {
	v.reported = now
	at := func(n *pb.NodeHeard) time.Time { return now.Add(-time.Duration(n.AgeMs) * time.Millisecond) }
	for _, n := range r.Held {
		if _, was := v.held[n.Node]; !was {
			fresh = true
			delete(v.gone, n.Node)
		}
		v.held[n.Node] = at(n)
	}
	for _, n := range r.Gone {
		delete(v.held, n.Node)
		v.gone[n.Node] = at(n)
	}
	return fresh
}

// Connected says whether any server holds the node's stream, as far as this one
// has heard.
func (s *Server) Connected(nodeID string) bool {
	s.mu.Lock()
	here := s.sessions[nodeID] != nil
	s.mu.Unlock()
	return here || len(s.holders(nodeID)) > 0
}

// holders are the other servers that say they hold a node, the likeliest first.
func (s *Server) holders(nodeID string) []string {
	type holder struct {
		id    string
		heard time.Time
	}
	var all []holder
	s.mu.Lock()
	for id, v := range s.views {
		if heard, ok := v.held[nodeID]; ok {
			all = append(all, holder{id, heard})
		}
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b holder) int { return b.heard.Compare(a.heard) })
	ids := make([]string, len(all))
	for i, h := range all {
		ids[i] = h.id
	}
	return ids
}

// client speaks to another server.
func (s *Server) client(serverID string) (pb.PeersClient, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.peers[serverID]
	if p == nil || p.conn == nil {
		return nil, cluster.Errorf(cluster.CodeUnavailable, "server %s cannot be reached now", serverID)
	}
	return pb.NewPeersClient(p.conn), nil
}

// others are the IDs of all other servers.
func (s *Server) others() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids := make([]string, 0, len(s.peers))
	for id := range s.peers {
		ids = append(ids, id)
	}
	return ids
}

// fromStatus gives an error of another server its cluster code again.
func fromStatus(serverID string, err error) error {
	st := status.Convert(err)
	code := cluster.CodeInternal
	switch st.Code() {
	case codes.InvalidArgument:
		code = cluster.CodeInvalid
	case codes.NotFound:
		code = cluster.CodeNotFound
	case codes.Unavailable:
		return cluster.Errorf(cluster.CodeUnavailable, "server %s: %s", serverID, st.Message())
	case codes.PermissionDenied:
		code = cluster.CodeForbidden
	case codes.Canceled:
		return context.Canceled
	case codes.DeadlineExceeded:
		return context.DeadlineExceeded
	}
	return cluster.Errorf(code, "%s", st.Message())
}
