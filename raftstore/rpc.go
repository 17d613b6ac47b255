package raftstore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/raftstore/pb"
)

// Bounds of the service between servers.
const (
	maxMessage     = 4 << 20 // bytes; an entry has at most MaxEntry
	maxStreams     = 2048    // calls under way on one connection
	maxClients     = 128     // connections kept
	redialFirst    = 20 * time.Millisecond
	redialLongest  = 200 * time.Millisecond
	keepaliveEvery = 10 * time.Second
	restoreChunk   = 256 << 10
)

// toStatus gives an error its code for the wire; fromStatus takes it back.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	code := codes.Unknown
	switch {
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	}
	st := status.New(code, err.Error())
	var plain *cluster.Error
	if errors.As(err, &plain) {
		detailed, e := st.WithDetails(&pb.Refusal{Code: string(plain.Code)})
		if e == nil {
			st = detailed
		}
	}
	return st.Err()
}

// fromStatus gives a *cluster.Error when the other server spoke, and gRPC's own
// error when it could not be asked.
func fromStatus(err error) error {
	for _, d := range status.Convert(err).Details() {
		if r, ok := d.(*pb.Refusal); ok {
			return &cluster.Error{Code: cluster.Code(r.Code), Text: status.Convert(err).Message()}
		}
	}
	return err
}

// unreachable says whether a call may not have been answered by the other server,
// or not for good.
func unreachable(err error) bool {
	if errors.As(err, new(*cluster.Error)) {
		return false
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded, codes.ResourceExhausted:
		return true
	}
	return false
}

// clients are the connections to other servers' gRPC services.
type clients struct {
	dial func(ctx context.Context, addr, target string) (net.Conn, error)

	mu     sync.Mutex
	conns  map[string]*grpc.ClientConn // by target@addr
	closed bool
}

// at gives the service of the server at addr; with a target only that server will do.
func (c *clients) at(addr, target string) (pb.PeersClient, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errClosing
	}
	key := target + "@" + addr
	if conn := c.conns[key]; conn != nil {
		return pb.NewPeersClient(conn), nil
	}
	if len(c.conns) >= maxClients {
		c.closeAll()
	}
	conn, err := grpc.NewClient("passthrough:///"+key,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return c.dial(ctx, addr, target) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the port's TLS lies below
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: redialFirst, Multiplier: 1.6, Jitter: 0.2, MaxDelay: redialLongest},
			MinConnectTimeout: meetTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveEvery, Timeout: keepaliveEvery / 2}),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(),
	)
	if err != nil {
		return nil, err
	}
	c.conns[key] = conn
	return pb.NewPeersClient(conn), nil
}

// drop closes all connections; the next use opens new ones.
func (c *clients) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closeAll()
}

func (c *clients) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.closeAll()
}

func (c *clients) closeAll() {
	for _, conn := range c.conns {
		_ = conn.Close()
	}
	clear(c.conns)
}

// dialPeers is how clients dials.
func (s *Store) dialPeers(ctx context.Context, addr, target string) (net.Conn, error) {
	conn, err := s.port.dial(ctx, kindPeers, addr, target)
	if errors.As(err, new(*refusal)) && s.circle.rarely(err.Error()) {
		s.log.Warn("another server turns this one away", "address", addr, "error", err)
	}
	return conn, err
}

// newService makes the gRPC server that answers other servers.
func (s *Store) newService() *grpc.Server {
	g := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), grpc.MaxConcurrentStreams(maxStreams),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveEvery / 2, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveEvery, Timeout: keepaliveEvery / 2}),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			end, err := s.serveCall(ctx, info.FullMethod)
			if err != nil {
				return nil, toStatus(err)
			}
			defer end()
			res, err := handle(ctx, req)
			return res, toStatus(err)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			end, err := s.serveCall(stream.Context(), info.FullMethod)
			if err != nil {
				return toStatus(err)
			}
			defer end()
			return toStatus(handle(srv, stream))
		}),
	)
	pb.RegisterPeersServer(g, &service{Store: s})
	return g
}

// forStrangers are the calls that a server may make before it belongs to the cluster.
var forStrangers = map[string]bool{
	pb.Peers_Meet_FullMethodName: true, pb.Peers_Promise_FullMethodName: true,
	pb.Peers_Release_FullMethodName: true, pb.Peers_Join_FullMethodName: true,
}

// serveCall begins an operation for another server, if that one may ask for it.
func (s *Store) serveCall(ctx context.Context, method string) (end func(), err error) {
	if !forStrangers[method] {
		p, _ := peer.FromContext(ctx)
		addr, ok := p.Addr.(peerAddr)
		if own := s.member.cluster(); !ok || own == "" || addr.cluster != own {
			return nil, cluster.Errorf(cluster.CodeForbidden, "%s is for servers of the same cluster", method[strings.LastIndex(method, "/")+1:])
		}
	}
	return s.begin()
}

// service answers the calls of other servers.
type service struct {
	pb.UnimplementedPeersServer
	*Store
}

// Meet implements pb.PeersServer.
func (s *service) Meet(_ context.Context, in *pb.Introduction) (*pb.Introduction, error) {
	if err := s.heardFrom(in); err != nil {
		return nil, cluster.Errorf(cluster.CodeInvalid, "%v", err)
	}
	return s.introduce(), nil
}

// Promise implements pb.PeersServer.
func (s *service) Promise(_ context.Context, f *pb.Formation) (*pb.Nothing, error) {
	if err := s.promise(f); err != nil {
		return nil, cluster.Errorf(cluster.CodeConflict, "%v", err)
	}
	return &pb.Nothing{}, nil
}

// Release implements pb.PeersServer.
func (s *service) Release(_ context.Context, f *pb.Formation) (*pb.Nothing, error) {
	s.callOff(f.Id, "its initiator called it off")
	return &pb.Nothing{}, nil
}

// Join implements pb.PeersServer.
func (s *service) Join(ctx context.Context, r *pb.JoinRequest) (*pb.JoinReply, error) {
	var server cluster.Server
	if err := cluster.Unmarshal(r.Server, &server); err != nil {
		return nil, cluster.Errorf(cluster.CodeInvalid, "%v", err)
	}
	local := func() (*pb.JoinReply, error) {
		return &pb.JoinReply{ClusterId: s.member.cluster()}, s.addServer(ctx, &server)
	}
	if r.Forwarded {
		return onlyLeader(s.Store, local)
	}
	return byLeader(ctx, s.Store, local, func(ctx context.Context, _ string, c pb.PeersClient) (*pb.JoinReply, error) {
		return c.Join(ctx, &pb.JoinRequest{Server: r.Server, Forwarded: true})
	})
}

// ReadIndex implements pb.PeersServer.
func (s *service) ReadIndex(ctx context.Context, r *pb.ReadIndexRequest) (*pb.ReadIndexReply, error) {
	return onlyLeader(s.Store, func() (*pb.ReadIndexReply, error) {
		index, err := s.readIndexHere(ctx, r.Verify)
		return &pb.ReadIndexReply{Index: index, Commit: s.committed()}, err
	})
}

// Term implements pb.PeersServer.
func (s *service) Term(context.Context, *pb.Nothing) (*pb.TermReply, error) {
	return &pb.TermReply{Term: s.raft.CurrentTerm()}, nil
}

// Remove implements pb.PeersServer.
func (s *service) Remove(_ context.Context, r *pb.RemoveRequest) (*pb.Nothing, error) {
	return onlyLeader(s.Store, func() (*pb.Nothing, error) { return &pb.Nothing{}, s.removeHere(r.Id) })
}

// Transfer implements pb.PeersServer.
func (s *service) Transfer(_ context.Context, r *pb.TransferRequest) (*pb.Nothing, error) {
	return onlyLeader(s.Store, func() (*pb.Nothing, error) { return &pb.Nothing{}, s.transferHere(r.Id) })
}

// Health implements pb.PeersServer.
func (s *service) Health(context.Context, *pb.Nothing) (*pb.HealthReply, error) {
	return onlyLeader(s.Store, func() (*pb.HealthReply, error) {
		return &pb.HealthReply{Health: cluster.Marshal(s.healthHere())}, nil
	})
}

// Ask implements pb.PeersServer.
func (s *service) Ask(ctx context.Context, r *pb.Question) (*pb.Answer, error) {
	return onlyLeader(s.Store, func() (*pb.Answer, error) {
		body, err := s.askHere(ctx, r.Body)
		return &pb.Answer{Body: body}, err
	})
}

// Witness implements pb.PeersServer.
func (s *service) Witness(ctx context.Context, r *pb.WitnessRequest) (*pb.WitnessReply, error) {
	index, term := s.lastLog()
	return &pb.WitnessReply{Gone: s.leaderGone(ctx, r.LeaderId, r.LeaderAddr), LastIndex: index, LastTerm: term}, nil
}

// onlyLeader answers if this server is the leader.
func onlyLeader[T any](s *Store, answer func() (T, error)) (T, error) {
	if !s.IsLeader() {
		var none T
		return none, cluster.ErrNoLeader
	}
	return answer()
}

// byLeader has the leader answer: this server, or another one that is asked over
// the wire. It waits for a leader, and tries again with the next one, for LeaderWait.
func byLeader[T any](ctx context.Context, s *Store, here func() (T, error), there func(ctx context.Context, leader string, c pb.PeersClient) (T, error)) (T, error) {
	var none T
	wait, cancel := context.WithTimeout(ctx, s.cfg.LeaderWait)
	defer cancel()
	for {
		leader, reign, err := s.waitLeader(wait)
		if err != nil {
			if ctx.Err() != nil {
				err = fmt.Errorf("wait for a leader: %w", ctx.Err())
			}
			return none, err
		}
		var res T
		if leader == string(s.id) {
			res, err = here()
		} else {
			res, err = askLeader(ctx, reign, s, leader, there)
		}
		switch {
		case err == nil:
			return res, nil
		case ctx.Err() != nil:
			return none, ctx.Err()
		case cluster.CodeOf(err) != cluster.CodeNoLeader && !unreachable(err):
			return none, err
		}
		if !pauseFor(wait, retryPause) && wait.Err() != nil && unreachable(err) {
			return none, cluster.Errorf(cluster.CodeUnavailable, "the leader did not answer in time; the change may have been made all the same")
		}
	}
}

// askLeader asks the leader over the wire, for as long as it is that.
func askLeader[T any](ctx, reign context.Context, s *Store, leader string, there func(ctx context.Context, leader string, c pb.PeersClient) (T, error)) (T, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(reign, cancel)()
	var res T
	client, err := s.clients.at(s.addrOf(leader), leader)
	if err == nil {
		res, err = there(ctx, leader, client)
	}
	return res, fromStatus(err)
}

// pauseFor waits a moment; false when ctx has ended.
func pauseFor(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
