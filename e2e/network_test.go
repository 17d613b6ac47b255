package e2e

import (
	"context"
	byteorder "encoding/binary"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A network puts each server on a host of its own and cuts the ways between them,
// each direction by itself. The test reaches every host, and no cut hinders it.
type network interface {
	// ip is the address of host i, 0…
	ip(i int) string
	// advertised is the address at which the other hosts reach host i.
	advertised(i int) string
	// on makes the command run on host i; runs says which process that has become.
	on(i int, cmd *exec.Cmd)
	runs(i, pid int)
	// cut drops what host from sends to host to, silently; heal lets all through.
	cut(from, to int)
	heal()
}

// noNamespaces is the variable that asks for proxies.
const noNamespaces = "RXVISION_TEST_NO_NAMESPACES"

// newNetwork gives network namespaces on a bridge where they can be made, which
// takes root, else proxies on loopback. ports are those that hosts reach each other at.
func newNetwork(t testing.TB, hosts int, ports ...int) network {
	if os.Getuid() == 0 && os.Getenv(noNamespaces) == "" {
		n, err := newNamespaces(t, hosts)
		if err == nil {
			return n
		}
		t.Logf("network namespaces cannot be made here, links are proxies instead: %v", err)
	}
	return newProxies(t, hosts, ports...)
}

// namespaces are hosts in network namespaces of their own, joined by a bridge.
type namespaces struct {
	t     testing.TB
	name  string // prefix of interface and namespace names
	net   string // the first three bytes of all addresses
	hosts int
}

// networks counts within this process, so that tests beside each other differ.
var networks struct {
	sync.Mutex
	n int
}

func newNamespaces(t testing.TB, hosts int) (*namespaces, error) {
	networks.Lock()
	networks.n++
	id := (os.Getpid()*7 + networks.n) % 60_000
	networks.Unlock()
	n := &namespaces{t: t, name: fmt.Sprintf("rx%d", id), net: fmt.Sprintf("10.%d.%d", 100+id/256%100, id%256), hosts: hosts}
	t.Cleanup(n.close)
	if err := n.ipCommand("link", "add", n.name+"b", "type", "bridge"); err != nil {
		return nil, err
	}
	steps := [][]string{{"addr", "add", n.net + ".254/24", "dev", n.name + "b"}, {"link", "set", n.name + "b", "up"}}
	for i := range hosts {
		ns, veth := n.ns(i), fmt.Sprintf("%sv%d", n.name, i)
		steps = append(steps,
			[]string{"netns", "add", ns},
			[]string{"link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", ns},
			[]string{"link", "set", veth, "master", n.name + "b", "up"},
			[]string{"-n", ns, "addr", "add", n.ip(i) + "/24", "dev", "eth0"},
			[]string{"-n", ns, "link", "set", "eth0", "up"},
			[]string{"-n", ns, "link", "set", "lo", "up"},
		)
	}
	for _, s := range steps {
		if err := n.ipCommand(s...); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func (n *namespaces) ns(i int) string { return fmt.Sprintf("%sn%d", n.name, i) }

func (n *namespaces) ipCommand(args ...string) error {
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

func (n *namespaces) close() {
	for i := range n.hosts {
		_ = n.ipCommand("netns", "del", n.ns(i)) // its interfaces go with it
	}
	_ = n.ipCommand("link", "del", n.name+"b")
}

func (n *namespaces) advertised(i int) string { return n.ip(i) }
func (n *namespaces) runs(int, int)           {}
func (n *namespaces) ip(i int) string         { return fmt.Sprintf("%s.%d", n.net, i+1) }

func (n *namespaces) on(i int, cmd *exec.Cmd) {
	ip, err := exec.LookPath("ip")
	if err != nil {
		n.t.Fatal(err)
	}
	cmd.Args = append([]string{"ip", "netns", "exec", n.ns(i)}, cmd.Args...) // ip becomes the command: the process ID stays
	cmd.Path = ip
}

// cut sends the frames for a neighbour to a card that nobody has.
func (n *namespaces) cut(from, to int) {
	if err := n.ipCommand("-n", n.ns(from), "neigh", "replace", n.ip(to), "lladdr", "02:00:00:00:00:99", "nud", "permanent", "dev", "eth0"); err != nil {
		n.t.Error(err)
	}
}

func (n *namespaces) heal() {
	for from := range n.hosts {
		for to := range n.hosts {
			if from != to {
				_ = n.ipCommand("-n", n.ns(from), "neigh", "del", n.ip(to), "dev", "eth0") // most have none
			}
		}
	}
}

// proxies are hosts on loopback addresses of their own. Each host listens at a
// private address, and what it advertises is a proxy's, which knows by the process
// that a connection belongs to which way the bytes go.
type proxies struct {
	t    testing.TB
	mu   sync.Mutex
	gone map[[2]int]bool
	host map[int]int // process → host
	wg   sync.WaitGroup
	ctx  context.Context // ends with the test
}

// host i listens at 127.77.0.i+1; others reach it at 127.78.0.i+1.
func newProxies(t testing.TB, hosts int, ports ...int) *proxies {
	ctx, end := context.WithCancel(context.Background())
	p := &proxies{t: t, gone: map[[2]int]bool{}, host: map[int]int{}, ctx: ctx}
	var listeners []net.Listener
	t.Cleanup(func() {
		end()
		for _, l := range listeners {
			l.Close()
		}
		p.wg.Wait()
	})
	for to := range hosts {
		for _, port := range ports {
			l, err := net.Listen("tcp", net.JoinHostPort(p.advertised(to), strconv.Itoa(port)))
			if err != nil {
				t.Fatal(err)
			}
			listeners = append(listeners, l)
			p.wg.Go(func() { p.accept(l, to, port) })
		}
	}
	return p
}

func (p *proxies) ip(i int) string         { return fmt.Sprintf("127.77.0.%d", i+1) }
func (p *proxies) advertised(i int) string { return fmt.Sprintf("127.78.0.%d", i+1) }
func (p *proxies) on(int, *exec.Cmd)       {}

func (p *proxies) runs(i, pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.host[pid] = i
}

func (p *proxies) accept(l net.Listener, to, port int) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.serve(c, to, port) })
	}
}

// from is the host whose process has the other end of a connection. false: nobody
// has it any more.
func (p *proxies) from(c net.Conn) (host int, ok bool) {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		socket := socketOf(c.RemoteAddr().String(), c.LocalAddr().String())
		if socket == "" {
			return 0, false
		}
		p.mu.Lock()
		pids := maps.Clone(p.host)
		p.mu.Unlock()
		for pid, host := range pids {
			files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
			if err != nil {
				p.t.Error(err)
			}
			for _, f := range files {
				if to, err := os.Readlink(f); err == nil && to == "socket:["+socket+"]" {
					return host, true
				}
			}
		}
	} // a process may just have been started, and not be known yet
	return 0, false
}

// socketOf is the inode of the socket of a TCP connection over IPv4 of this
// machine, "" for none.
func socketOf(local, remote string) string {
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return ""
	}
	hex := func(address string) string {
		a := netip.MustParseAddrPort(address)
		ip := a.Addr().Unmap().As4()
		return fmt.Sprintf("%08X:%04X", byteorder.NativeEndian.Uint32(ip[:]), a.Port())
	}
	l, r := hex(local), hex(remote)
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 9 && f[1] == l && f[2] == r && f[9] != "0" {
			return f[9]
		}
	}
	return ""
}

// serve joins two connections. While a way is cut its bytes wait, as in TCP.
func (p *proxies) serve(c net.Conn, to, port int) {
	defer c.Close()
	defer context.AfterFunc(p.ctx, func() { c.Close() })()
	from, ok := p.from(c)
	if !ok || !p.pass(from, to) {
		return
	}
	d, err := net.Dial("tcp", net.JoinHostPort(p.ip(to), strconv.Itoa(port)))
	if err != nil {
		return
	}
	defer d.Close()
	defer context.AfterFunc(p.ctx, func() { d.Close() })()
	var both sync.WaitGroup
	both.Go(func() { p.copy(d, c, from, to); d.Close() })
	both.Go(func() { p.copy(c, d, to, from); c.Close() })
	both.Wait()
}

func (p *proxies) copy(w io.Writer, r io.Reader, from, to int) {
	b := make([]byte, 32<<10)
	for {
		n, err := r.Read(b)
		if n > 0 {
			if !p.pass(from, to) {
				return
			}
			if _, err := w.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// pass waits while the way is cut; false at the test's end.
func (p *proxies) pass(from, to int) bool {
	for {
		p.mu.Lock()
		cut := p.gone[[2]int{from, to}]
		p.mu.Unlock()
		if !cut {
			return true
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-p.ctx.Done():
			return false
		}
	}
}

func (p *proxies) cut(from, to int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone[[2]int{from, to}] = true
}

func (p *proxies) heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.gone)
}
