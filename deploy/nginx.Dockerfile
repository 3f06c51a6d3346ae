# nginx with the `sticky` rendering of nginx/nginx.conf.template, which is rendered when the container starts.
FROM nginx:1.30.6

# For the first certificate and the health check. The image has both tools at present; this line ensures it.
RUN command -v openssl && command -v curl \
    || { apt-get update && apt-get install -y --no-install-recommends openssl curl && rm -rf /var/lib/apt/lists/*; }

COPY nginx/render.sh nginx/nginx.conf.template /opt/skein/nginx/
COPY deploy/nginx-start.sh /opt/skein/

EXPOSE 80 443

# Checks nginx only. GET /ready tells whether a gateway is available.
HEALTHCHECK --interval=5s --timeout=3s --retries=3 CMD ["curl", "-fsS", "-o", "/dev/null", "http://127.0.0.1/"]

ENTRYPOINT ["/opt/skein/nginx-start.sh"]
