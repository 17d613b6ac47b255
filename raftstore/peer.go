package raftstore

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"

	"github.com/rxvision/rxvision/cluster"
)

// The Raft port carries everything that servers say to each other. After the TLS
// handshake, if any, the dialler says hello:
//
//	"RXV1", the kind's byte, and four strings, each behind a byte with its length:
//	region, cluster ID, the dialler's server ID, the server ID that it means to reach
//
// An empty cluster ID means none yet, an empty target anyone. The answer is a byte,
// 0 for welcome, and two strings behind two bytes of length each: the server's ID
// and cluster ID, or why it was refused and nothing. Then the connection belongs
// to its kind.
const helloMagic = "RXV1"

// Kinds of connections.
const (
	kindRaft  = 'R' // raft's own messages
	kindPeers = 'P' // the gRPC service of raftstore/pb
	kindFleet = 'F' // what PeerListener accepts
)

// Bounds of the port.
const (
	helloTimeout  = 10 * time.Second // TLS handshake and hello together
	maxHandshakes = 128              // under way at once; more are turned away
	acceptQueue   = 64               // connections of a kind that wait for its server
	maxRefusal    = 1024             // bytes of a refusal that a dialler reads
)

// PeerTLS gives the TLS settings of the Raft port. Each is asked anew for every
// connection, so that certificates can change; they must verify that the other
// side is a server of the region.
type PeerTLS struct {
	Server, Client func() *tls.Config
}

// hello is what a dialler says first.
type hello struct {
	kind                            byte
	region, cluster, sender, target string
}

func (h *hello) write(w io.Writer) error {
	b := append([]byte(helloMagic), h.kind)
	for _, s := range []string{h.region, h.cluster, h.sender, h.target} {
		if len(s) > 255 {
			return fmt.Errorf("%q is too long for the hello between servers", s)
		}
		b = append(append(b, byte(len(s))), s...)
	}
	_, err := w.Write(b)
	return err
}

// readHello reads no byte more than the hello, since what follows is the kind's.
func readHello(r io.Reader) (h hello, err error) {
	var head [len(helloMagic) + 1]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return h, err
	}
	if string(head[:len(helloMagic)]) != helloMagic {
		return h, errNoHello
	}
	h.kind = head[len(helloMagic)]
	for _, s := range []*string{&h.region, &h.cluster, &h.sender, &h.target} {
		var n [1]byte
		if _, err := io.ReadFull(r, n[:]); err != nil {
			return h, err
		}
		b := make([]byte, n[0])
		if _, err := io.ReadFull(r, b); err != nil {
			return h, err
		}
		*s = string(b)
	}
	return h, nil
}

var errNoHello = errors.New("it speaks another protocol")

// writeWelcome answers a hello: refused when it is not nil.
func writeWelcome(w io.Writer, id, cluster string, refused error) error {
	status, texts := byte(0), []string{id, cluster}
	if refused != nil {
		status, texts = 1, []string{refused.Error(), ""}
	}
	b := []byte{status}
	for _, t := range texts {
		t = t[:min(len(t), maxRefusal)]
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(t))), t...)
	}
	_, err := w.Write(b)
	return err
}

// readWelcome gives the server's ID and cluster, or a *refusal.
func readWelcome(r io.Reader) (id, cluster string, err error) {
	var status [1]byte
	if _, err := io.ReadFull(r, status[:]); err != nil {
		return "", "", err
	}
	texts := make([]string, 2)
	for i := range texts {
		var n [2]byte
		if _, err := io.ReadFull(r, n[:]); err != nil {
			return "", "", err
		}
		b := make([]byte, min(binary.BigEndian.Uint16(n[:]), maxRefusal))
		if _, err := io.ReadFull(r, b); err != nil {
			return "", "", err
		}
		texts[i] = string(b)
	}
	if status[0] != 0 {
		return "", "", &refusal{texts[0]}
	}
	return texts[0], texts[1], nil
}

// refusal is the other server's sentence.
type refusal struct{ text string }

func (r *refusal) Error() string { return "it refused the connection: " + r.text }

// dialer is net.Dialer's DialContext.
type dialer func(ctx context.Context, network, addr string) (net.Conn, error)

// port is the Raft port.
type port struct {
	net.Listener
	advertise net.Addr
	tls       *PeerTLS
	log       *slog.Logger
	greet     func(kind byte, target string) hello // what this server says first
	admit     func(hello) error                    // whether it lets the dialler in
	lost      func(serverID string)                // a connection of raft from that server has ended
	rarely    func(text string) bool               // whether to log that, because it has not been for long
	dialer    dialer
	kinds     map[byte]*queue

	mu     sync.Mutex
	conns  map[*peerConn]struct{} // all that are open, to be closed at the end
	closed bool
	work   sync.WaitGroup
}

// listenPort opens the port; nobody is let in before serve.
func listenPort(bind, advertise string, secure *PeerTLS, log *slog.Logger) (*port, error) {
	p := &port{tls: secure, log: log, conns: map[*peerConn]struct{}{}, kinds: map[byte]*queue{}}
	if advertise != "" {
		a, err := net.ResolveTCPAddr("tcp", advertise)
		if err != nil {
			return nil, fmt.Errorf("raft address to advertise: %w", err)
		}
		p.advertise = a
	}
	l, err := net.Listen("tcp", bind)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("raft address %s is taken by another program; end that one or choose another port", bind)
	}
	if err != nil {
		return nil, fmt.Errorf("raft address %s: %w", bind, err)
	}
	p.Listener = l
	if p.advertise == nil {
		p.advertise = l.Addr()
	}
	addr := p.advertise.(*net.TCPAddr)
	switch {
	case addr.IP == nil || addr.IP.IsUnspecified():
		err = fmt.Errorf("raft address %s: other servers cannot dial it; advertise one that they can", cmp.Or(advertise, bind))
	case secure == nil && (!addr.IP.IsLoopback() || !l.Addr().(*net.TCPAddr).IP.IsLoopback()):
		err = fmt.Errorf("raft address %s: without TLS servers talk over loopback only; set certificates", addr)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	for _, k := range []byte{kindRaft, kindPeers, kindFleet} {
		p.kinds[k] = &queue{addr: p.advertise, conns: make(chan net.Conn, acceptQueue), done: make(chan struct{})}
	}
	return p, nil
}

// serve accepts connections until close.
func (p *port) serve() {
	slots := make(chan struct{}, maxHandshakes)
	p.work.Go(func() {
		for {
			conn, err := p.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // too many open files
				p.log.Warn("raft port cannot accept a connection", "error", err)
				time.Sleep(retryPause)
				continue
			}
			select {
			case slots <- struct{}{}:
				p.work.Go(func() {
					defer func() { <-slots }()
					p.welcome(conn)
				})
			default:
				_ = conn.Close() // the dialler tries again
			}
		}
	})
}

// welcome takes a new connection to its kind.
func (p *port) welcome(raw net.Conn) {
	c := &peerConn{Conn: raw, raw: raw, port: p}
	if !p.track(c) {
		return
	}
	h, err := p.handshake(c)
	if err != nil {
		_ = c.Close()
		var refused *refusal
		switch {
		case errors.As(err, &refused):
			if p.rarely(err.Error()) {
				p.log.Warn("refused a connection from another server", "address", raw.RemoteAddr().String(), "server", h.sender, "reason", refused.text)
			}
		case !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET):
			p.log.Info("a connection to the raft port came to nothing", "address", raw.RemoteAddr().String(), "error", err)
		}
		return
	}
	c.mu.Lock()
	c.peer, c.cluster, c.raft = h.sender, h.cluster, h.kind == kindRaft
	c.mu.Unlock()
	p.kinds[h.kind].put(c)
}

func (p *port) handshake(c *peerConn) (h hello, err error) {
	if err := c.SetDeadline(time.Now().Add(helloTimeout)); err != nil {
		return h, err
	}
	if p.tls != nil {
		secure := tls.Server(c.Conn, p.tls.Server())
		if err := secure.Handshake(); err != nil {
			return h, fmt.Errorf("TLS: %w", err)
		}
		c.Conn = secure
	}
	if h, err = readHello(c); err != nil {
		return h, err
	}
	refused := p.admit(h)
	if p.kinds[h.kind] == nil {
		refused = fmt.Errorf("connections of kind %q are not known to this version of rxvision", h.kind)
	}
	own := p.greet(h.kind, "")
	if err := writeWelcome(c, own.sender, own.cluster, refused); err != nil {
		return h, err
	}
	if refused != nil {
		return h, &refusal{refused.Error()}
	}
	return h, c.SetDeadline(time.Time{})
}

// dial connects to a server's Raft port. With a target only that server will do.
func (p *port) dial(ctx context.Context, kind byte, addr, target string) (_ net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	raw, err := p.dialer(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	c := &peerConn{Conn: raw, raw: raw, port: p, peer: target}
	if !p.track(c) {
		return nil, errClosing
	}
	defer func() {
		if err != nil {
			_ = c.Close()
			err = fmt.Errorf("server at %s: %w", addr, cmpErr(ctx.Err(), err))
		}
	}()
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	if p.tls != nil {
		conf := p.tls.Client()
		if conf.ServerName == "" && !conf.InsecureSkipVerify {
			host, _, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			conf = conf.Clone()
			conf.ServerName = host
		}
		secure := tls.Client(raw, conf)
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, fmt.Errorf("TLS: %w", err)
		}
		c.Conn = secure
	}
	h := p.greet(kind, target)
	if err := h.write(c); err != nil {
		return nil, err
	}
	id, cluster, err := readWelcome(c)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.peer, c.cluster = id, cluster
	c.mu.Unlock()
	if !stop() {
		return nil, ctx.Err()
	}
	return c, nil
}

// track notes an open connection; false, and closed, when the port is closed.
func (p *port) track(c *peerConn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		_ = c.raw.Close()
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

// sever closes every connection for which cut is true.
func (p *port) sever(cut func(*peerConn) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		if cut(c) {
			_ = c.raw.Close()
			delete(p.conns, c)
		}
	}
}

// close ends the port and every connection, and waits for its goroutines.
func (p *port) close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	err := p.Listener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	for _, q := range p.kinds {
		_ = q.Close()
	}
	p.sever(func(*peerConn) bool { return true })
	p.work.Wait()
	return err
}

// peerConn is a connection to another server.
type peerConn struct {
	net.Conn          // with TLS, if any
	raw      net.Conn // without
	port     *port
	once     sync.Once

	mu            sync.Mutex
	peer, cluster string // the other side's server and cluster ID
	raft          bool   // it was accepted, for raft
}

// PeerID is the server ID of the other side.
func (c *peerConn) PeerID() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.peer
}

// Read implements net.Conn. A connection of raft that breaks is a first sign that
// the other server has died.
func (c *peerConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	switch {
	case err == nil || errors.Is(err, os.ErrDeadlineExceeded):
	case errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe):
		return n, io.EOF // this server's own doing
	default:
		c.mu.Lock()
		tell := c.raft
		c.raft = false
		c.mu.Unlock()
		if tell {
			c.port.lost(c.PeerID())
		}
	}
	return n, err
}

// RemoteAddr implements net.Conn; it tells the server too.
func (c *peerConn) RemoteAddr() net.Addr {
	c.mu.Lock()
	defer c.mu.Unlock()
	return peerAddr{c.raw.RemoteAddr(), c.peer, c.cluster}
}

// Close implements net.Conn.
func (c *peerConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.port.mu.Lock()
		delete(c.port.conns, c)
		c.port.mu.Unlock()
	})
	return err
}

// peerAddr is an address with the server behind it.
type peerAddr struct {
	net.Addr
	server, cluster string
}

// queue is a listener of the connections of one kind.
type queue struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

// put hands a connection over; when nobody takes it, or the queue is closed, it is closed.
func (q *queue) put(c net.Conn) {
	select {
	case <-q.done:
	default:
		select {
		case q.conns <- c:
			return
		default:
		}
	}
	_ = c.Close()
}

// Accept implements net.Listener.
func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

// Addr implements net.Listener: the address at which others reach this server.
func (q *queue) Addr() net.Addr { return q.addr }

// raftLayer is raft's way over the port. Addresses are host:port, or ID@host:port
// as Store.ServerAddr gives them, where only that server will do.
type raftLayer struct {
	*queue
	port *port
}

// Dial implements raft.StreamLayer. A server reaches itself without a network.
func (l *raftLayer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	target, addr, named := strings.Cut(string(address), "@")
	if !named {
		target, addr = "", target
	}
	if addr == l.addr.String() {
		here, there := net.Pipe()
		c := &peerConn{Conn: there, raw: there, port: l.port}
		if !l.port.track(c) {
			return nil, errClosing
		}
		l.put(c)
		return here, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return l.port.dial(ctx, kindRaft, addr, target)
}

// PeerListener gives the connections that other servers of the cluster open with
// DialPeer. The store owns it: it ends when the store is closed.
func (s *Store) PeerListener() net.Listener { return s.port.kinds[kindFleet] }

// DialPeer connects to another server of the cluster, to its PeerListener. The
// connection is authenticated, and encrypted where the Raft port is.
func (s *Store) DialPeer(ctx context.Context, serverID string) (net.Conn, error) {
	addr := s.addrOf(serverID)
	if addr == "" {
		return nil, cluster.Errorf(cluster.CodeNotFound, "no server of this cluster has the ID %s", serverID)
	}
	conn, err := s.port.dial(ctx, kindFleet, addr, serverID)
	if err != nil {
		return nil, cluster.Errorf(cluster.CodeUnavailable, "server %s cannot be reached: %v", serverID, err)
	}
	return conn, nil
}

// greet is what this server says of itself.
func (s *Store) greet(kind byte, target string) hello {
	return hello{kind: kind, region: s.cfg.Region, cluster: s.member.cluster(), sender: string(s.id), target: target}
}

// admit decides whether the dialler is let in. Its sentences are told to it.
func (s *Store) admit(h hello) error {
	if h.region != s.cfg.Region {
		return fmt.Errorf("this server belongs to region %q, not %q", s.cfg.Region, h.region)
	}
	if h.target != "" && h.target != string(s.id) {
		return fmt.Errorf("this is server %s, not %s", s.id, h.target)
	}
	own, other := s.member.cluster(), h.cluster
	if own != "" && other != "" && own != other {
		return fmt.Errorf("this server belongs to cluster %s, not %s; two clusters are never joined: empty one's data folders if it was begun by mistake", own, other)
	}
	switch {
	case h.kind == kindPeers, own != "" && own == other:
		return nil
	case h.kind == kindRaft && s.inConfiguration(raft.ServerID(h.sender)):
		return nil // one of the two has lost its note of the cluster's ID, but not its log
	case h.kind == kindRaft && other != "" && s.member.begin(other):
		s.poke()
		return nil
	}
	return errors.New("this server does not belong to your cluster")
}

// probe asks the kernel at addr whether the server's process is there: gone means
// that the connection was refused, or died at once, several times.
func (p *port) probe(ctx context.Context, addr string) (gone bool) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	for range probeTries {
		conn, err := p.dialer(ctx, "tcp", addr)
		if err == nil {
			// A process that is about to die still had its listener.
			_ = conn.SetReadDeadline(time.Now().Add(probePause))
			_, err = bufio.NewReaderSize(conn, 1).ReadByte()
			_ = conn.Close()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return false // it holds the line
			}
		} else if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) {
			return false
		}
		select {
		case <-time.After(probePause):
		case <-ctx.Done():
			return false
		}
	}
	return true
}
