package main

import (
	"fmt"
	"net"
	"net/http"
	"strings"
)

// guard refuses what a web page in a browser on this machine could send to a
// loopback address: requests of another origin (forged requests), and requests
// under a name that is neither this machine's nor bound's (a name that was made
// to point here, so that the page shares its origin). Programs send no Origin
// and call by address, so they notice nothing. refuse writes the answer.
func guard(next http.Handler, bound string, refuse func(w http.ResponseWriter, why string)) http.Handler {
	boundHost, _, err := net.SplitHostPort(bound)
	if err != nil {
		boundHost = bound
	}
	origins := http.NewCrossOriginProtection()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = strings.Trim(r.Host, "[]")
		}
		local := host == "" || strings.EqualFold(host, "localhost") || strings.EqualFold(host, boundHost) || net.ParseIP(host) != nil
		if !local {
			refuse(w, fmt.Sprintf("the request is for host %.100q, but this server answers to localhost and addresses only", r.Host))
			return
		}
		if err := origins.Check(r); err != nil {
			refuse(w, "the request comes from a web page of another origin, which may not use this server")
			return
		}
		next.ServeHTTP(w, r)
	})
}
